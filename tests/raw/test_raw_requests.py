"""No request reaches another host, a private path, or a path that is not listed."""

from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from src.core.errors import CallerError
from src.raw.requests import check_headers, parse
from src.raw.wire_api import WIRE_APIS

LISTED = [
    (name, path.replace("*", "a-name")) for name, api in WIRE_APIS.items() for path in api.paths
]
pieces = st.one_of(
    st.sampled_from(
        ["api/v3/", "fapi/v1/", "futures/data/", "v5/market/", "0/public/", "..", "/", "//", "@"]
    ),
    st.sampled_from(["http://evil.example", "evil.example:80", "%2e%2e", "\\", "?", "#", "\r\n"]),
    st.text(max_size=8),
    st.sampled_from([path for _, path in LISTED]),
)
paths = st.lists(pieces, min_size=1, max_size=4).map("".join)
names = st.sampled_from(["symbol", "limit", "host", "url", "@evil.example", "category"])
queries = st.lists(st.tuples(names, st.text(max_size=12)), max_size=3)


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from([*WIRE_APIS]), paths, queries)
def test_no_request_leaves_the_host_and_the_listed_paths(
    exchange: str, path: str, query: list[tuple[str, str]]
) -> None:
    text = "&".join(f"{name}={quote(value)}" for name, value in query)
    try:
        request = parse(exchange, path, text)
    except CallerError:
        return
    api = WIRE_APIS[exchange]
    for base in ("", "http://127.0.0.1:9"):
        url = URL(request.url(base), encoded=True)
        assert str(url.origin()) in ({base} if base else set(api.hosts.values()))
        assert url.path == f"/{path}"
        assert api.find(url.path[1:]) is not None
        assert url.fragment == ""


@pytest.mark.parametrize(("exchange", "path"), LISTED)
def test_listed_paths_are_found(exchange: str, path: str) -> None:
    """Each has a weight without parameters, and goes to a host of its exchange."""
    request = parse(exchange, path, "")
    assert request.rules.weight_of({}) > 0
    assert request.url("").startswith("https://")


@given(st.binary(max_size=20))
def test_headers_of_signed_requests_are_found_in_any_case(text: bytes) -> None:
    for name in (b"x-mbx-apikey", b"API-Key", b"Api-Sign", b"X-BAPI-" + text.replace(b"\n", b"")):
        with pytest.raises(CallerError):
            check_headers([b"accept", name])


@pytest.mark.parametrize("name", [b"x-api-key", b"accept", b"user-agent", b"x-forwarded-for"])
def test_other_headers_are_accepted(name: bytes) -> None:
    check_headers([name])
