// Print pushed tickers and reconnect: `node --experimental-websocket examples/stream.js BTC-USDT ETH-USDT`
// (from Node 22 on without the flag; in a browser set `url` and `symbols`). GATEWAY is the address. API_KEY is
// the key if the gateway requires one; browsers cannot send headers with a WebSocket, so it is part of the URL.
const inNode = typeof process !== "undefined";
const url = new URL((inNode && process.env.GATEWAY) || "ws://127.0.0.1:8000/ws");
const symbols = (inNode && process.argv.slice(2).length && process.argv.slice(2)) || ["BTC-USDT"];
if (inNode && process.env.API_KEY) url.searchParams.set("token", process.env.API_KEY);
const SILENT_MS = 35_000; // two missed heartbeats: the connection is dead, even if TCP is open
let pause = 500;

function show(message) {
  const where = `${message.exchange ?? ""} ${message.symbol ?? ""}`;
  if (message.type === "snapshot" || message.type === "update") {
    // a snapshot replaces all data; an update follows the previous message
    const { price, source } = message.data;
    console.log(message.type, where, message.seq, price, `${message.sent_at - message.fetched_at} ms in the gateway, by ${source}`);
  } else if (message.type === "status") {
    console.log("status", where, message.state, message.state === "stale" ? "- do not trade on it" : "");
  } else if (message.type === "error") console.log("error", message.code, message.detail);
  else if (message.type === "subscribed") console.log("subscribed", message.symbols, message.errors);
}

function connect() {
  const socket = new WebSocket(url);
  let silence;
  const restartTimer = () => { clearTimeout(silence); silence = setTimeout(() => lost("silent"), SILENT_MS); };
  function lost(why, code) {
    clearTimeout(silence);
    socket.onclose = socket.onmessage = socket.onerror = null;
    socket.close();
    if (code === 1008) return console.log("refused:", why); // a retry would be refused, too
    console.log("lost:", why);
    setTimeout(connect, pause * (0.5 + Math.random() / 2)); // spread clients
    pause = Math.min(2 * pause, 30_000);
  }
  socket.onopen = () => socket.send(JSON.stringify({ op: "subscribe", channel: "ticker", symbols }));
  socket.onmessage = ({ data }) => {
    const message = JSON.parse(data);
    restartTimer();
    show(message);
    if (message.type !== "error") pause = 500;
  };
  socket.onerror = () => lost("error");
  socket.onclose = ({ code, reason }) => lost(reason || code, code);
  restartTimer();
}

connect();
