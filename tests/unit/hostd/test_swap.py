"""Secrets in the place of their placeholders: exactly where the route says, and a leak anywhere else."""

import base64
from dataclasses import replace

import pytest

from fleet.model.secret import SecretValue
from hostd.egress.swap import Head, Leak, Substitute, Swapped, swap

PLACEHOLDER, SECRET = b"sk-bedplate_abcdefghijkl_API_KEY", b"sk-r3al/+=&% secret"
BOUND = Substitute(
    "API_KEY", PLACEHOLDER, SecretValue(SECRET), frozenset([b"authorization", b"x-api-key"]), frozenset([b"key"])
)
ELSEWHERE = replace(BOUND, headers=frozenset(), query=frozenset())


def head(target: bytes = b"/v1/messages", **headers: bytes) -> Head:
    """A request with these headers."""
    named = ((name.replace("_", "-").encode(), value) for name, value in headers.items())
    return Head(b"POST", target, ((b"Host", b"api.example.com"), *named))


def basic(text: bytes) -> bytes:
    return b"Basic " + base64.b64encode(text)


def test_headers() -> None:
    """In every header that the route names, however its name is written, also twice and within other words."""
    found = swap(head(Authorization=b"Bearer " + PLACEHOLDER, X_API_KEY=PLACEHOLDER + b"," + PLACEHOLDER), [BOUND])
    assert found == Swapped(head(Authorization=b"Bearer " + SECRET, X_API_KEY=SECRET + b"," + SECRET), ("API_KEY",))


def test_basic_credentials() -> None:
    """git and pip send them so: decoded, swapped, encoded again."""
    found = swap(head(Authorization=basic(b"user:" + PLACEHOLDER)), [BOUND])
    assert found == Swapped(head(Authorization=basic(b"user:" + SECRET)), ("API_KEY",))


def test_query() -> None:
    """In the named parameter's value, encoded so that it stays one; the others stay as they were, byte for byte."""
    found = swap(head(b"/v1?a=%20b&key=" + PLACEHOLDER + b"&key&c=d"), [BOUND])
    assert isinstance(found, Swapped)
    assert found.head.target == b"/v1?a=%20b&key=sk-r3al%2F%2B%3D%26%25%20secret&key&c=d"


def test_a_request_without_placeholders_is_as_it_was() -> None:
    """And no secret is used."""
    asked = head(b"/v1?key=%zz&&=", Authorization=b"Basic !!!", Cookie=b"\xff")
    assert swap(asked, [BOUND, ELSEWHERE]) == Swapped(asked, ())


PERCENT = b"".join(b"%%%02X" % byte for byte in PLACEHOLDER)


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        (head(Cookie=b"a=" + PLACEHOLDER), "the header cookie"),
        (head(Authorization=PLACEHOLDER, Cookie=PLACEHOLDER), "the header cookie"),
        (head(Cookie=basic(PLACEHOLDER)), "the header cookie"),
        (head(Referer=b"https://x/" + PERCENT), "the header referer"),
        (head(b"/" + PLACEHOLDER), "the target"),
        (head(b"/" + PERCENT), "the target"),
        (head(b"/" + PERCENT.replace(b"%", b"%25")), "the target"),
        (head(b"/?other=" + PLACEHOLDER), "the target"),
        (head(b"/?" + PLACEHOLDER + b"=1"), "the target"),
        (head(b"/?key=" + PLACEHOLDER + b"&x=" + PERCENT), "the target"),
        (Head(b"GET", b"/", ((PLACEHOLDER, b"1"),)), "a header's name"),
    ],
)
def test_a_placeholder_elsewhere_is_a_leak(asked: Head, where: str) -> None:
    """Named with its place; nothing is sent, also when another one stood where it may."""
    assert swap(asked, [BOUND]) == Leak("API_KEY", where)


def test_a_host_that_the_route_is_not_bound_to_gets_nothing() -> None:
    """There every place is another one."""
    for asked in (
        head(Authorization=PLACEHOLDER),
        head(Authorization=basic(b"u:" + PLACEHOLDER)),
        head(b"/?key=" + PLACEHOLDER),
    ):
        assert isinstance(swap(asked, [ELSEWHERE]), Leak)


@pytest.mark.parametrize("secret", [b"a\r\nX-Evil: 1", b"a\n", b"a\0"])
def test_a_secret_that_would_end_its_line_is_not_sent(secret: bytes) -> None:
    """Its owner is told what is wrong with it, without the value."""
    found = swap(head(Authorization=PLACEHOLDER), [replace(BOUND, secret=SecretValue(secret))])
    assert isinstance(found, Leak)
    assert "control character" in found.where


def test_two_routes_do_not_disturb_each_other() -> None:
    """A secret that looks like another's placeholder is put in as it is, and taken for no leak."""
    other = Substitute(
        "OTHER", b"bedplate_abcdefghijkl_OTHER", SecretValue(b"x" + PLACEHOLDER), frozenset([b"x-other"])
    )
    asked = head(Authorization=PLACEHOLDER, X_Other=other.placeholder)
    for order in ([BOUND, other], [other, BOUND]):
        assert swap(asked, order) == Swapped(
            head(Authorization=SECRET, X_Other=b"x" + PLACEHOLDER), tuple(one.name for one in order)
        )
