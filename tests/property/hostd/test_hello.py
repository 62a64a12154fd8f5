"""The ClientHello's name: what a real client wrote, in whatever pieces it comes; anything else is refused, and nothing crashes."""

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import InvalidSpecError
from hostd.egress.hello import HELLO_BYTES_MAX, Hello, HelloReader, make_hello_context

CONTEXT = make_hello_context()
LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
NAMES = st.lists(LABELS, min_size=1, max_size=5).map(".".join).filter(lambda name: not name.replace(".", "").isdigit())


def hello_of(name: str | None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> bytes:
    """What OpenSSL's own client sends first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.maximum_version = version
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def read(chunks: list[bytes]) -> Hello | None:
    reader = HelloReader(CONTEXT)
    for chunk in chunks:
        hello = reader.feed(chunk)
        if hello is not None:
            return hello
    return None


def read_or_refuse(content: bytes) -> Hello | str | None:
    """The hello, or the code of the error."""
    try:
        return read([content])
    except InvalidSpecError as error:
        return error.code


def is_harmless(content: bytes) -> bool:
    """Whether it is refused, waited for, or read with a name that stands in its bytes."""
    found = read_or_refuse(content)
    return found in (None, "tls_invalid") or (isinstance(found, Hello) and found.server_name.encode() in content)


@given(NAMES, st.sampled_from([ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]), st.data())
def test_the_name_is_read_in_any_pieces(name: str, version: ssl.TLSVersion, data: st.DataObject) -> None:
    """Whole when its last byte is there, not before; what was sent is kept to be passed on."""
    content = hello_of(name, version)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=6)))
    chunks = [content[start:end] for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    assert read(chunks) == Hello(name, content)
    assert read([content[:-1]]) is None


def test_a_client_that_names_nobody_is_told_apart() -> None:
    """Without a name there is nothing to allow."""
    content = hello_of(None)
    assert read([content]) == Hello("", content)


def test_what_follows_the_hello_is_kept() -> None:
    """Early data that came with it belongs to the server."""
    content = hello_of("api.example.com") + b"\x17\x03\x03\x00\x04late"
    hello = read([content])
    assert hello is not None
    assert (hello.server_name, hello.content) == ("api.example.com", content)


@pytest.mark.parametrize(
    "content", [b"GET / HTTP/1.1\r\nHost: api.example.com\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", bytes(64)]
)
def test_other_protocols_are_refused(content: bytes) -> None:
    """By their first bytes, with words for whoever reads the log."""
    with pytest.raises(InvalidSpecError) as caught:
        read([content])
    assert caught.value.code == "tls_invalid"


def test_a_hello_without_end_is_refused() -> None:
    """A record that never becomes whole costs no more than the limit."""
    endless = b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc" + bytes(HELLO_BYTES_MAX)
    assert read([endless[:HELLO_BYTES_MAX]]) is None
    with pytest.raises(InvalidSpecError, match="more than"):
        read([endless[:HELLO_BYTES_MAX], endless[HELLO_BYTES_MAX:]])


@given(st.data())
def test_a_mutilated_hello_names_nobody_else(data: st.DataObject) -> None:
    """Whatever is changed: it is refused, waited for, or read with a name that stands in its bytes."""
    content = bytearray(hello_of("api.example.com"))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        content = content or bytearray(b"\x16")
    assert is_harmless(bytes(content))


@given(st.binary(max_size=600))
def test_any_bytes_are_no_crash(content: bytes) -> None:
    """Refused or waited for."""
    for start in (b"", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"):
        assert is_harmless(start + content)
