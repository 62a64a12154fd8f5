"""The image store's verbs: what is removed was meant, what is imported is whole, every refusal has its code and a next step."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from provisioning.__main__ import main
from provisioning.imagestore import STAGING_PREFIX, image_path, put_image, read_tag, staging_dir, write_tag
from provisioning.manifest import FILE_ROLES, MANIFEST_NAME, ImageFile, Manifest
from provisioning.verify import digest_file, verify_image


def _put(images_dir: Path, content: str) -> str:
    with staging_dir(images_dir) as staging:
        for role in FILE_ROLES:
            (staging / role).write_text(content + role)
        files = {role: ImageFile(role, digest_file(staging / role), len(content) + len(role)) for role in FILE_ROLES}
        return put_image(images_dir, staging, Manifest("base", "x86_64", 1, "quiet", files, ()))


@pytest.fixture
def store(tmp_path: Path) -> tuple[Path, str, str]:
    """A store with a tagged image and another."""
    images_dir = tmp_path / "images"
    tagged, other = _put(images_dir, "one"), _put(images_dir, "two")
    write_tag(images_dir, "base:latest", tagged)
    return images_dir, tagged, other


def _fault(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The code of the error that a verb ends with, with `--json`."""
    assert main([*arguments, "--json"]) in (1, 2)
    error = json.loads(capsys.readouterr().err)["error"]
    assert error["next_step"]
    return str(error["code"])


def test_an_image_survives_the_way_to_another_store(
    store: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Export and import give the same digest, verified; and two exports are the same bytes."""
    images_dir, tagged, _ = store
    files = [tmp_path / "a.tar", tmp_path / "b.tar"]
    for file in files:
        assert main(["export", "base:latest", str(file), "--images", str(images_dir)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert main(["import", str(files[0]), "--images", str(tmp_path / "there"), "--digest", tagged, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"digest": tagged, "tag": "base:latest"}
    assert verify_image(image_path(tmp_path / "there", tagged), tagged).name == "base"
    assert _fault(capsys, "export", "base:latest", str(files[0]), "--images", str(images_dir)) == "file_exists"


def test_a_file_that_is_not_the_image_is_refused(
    store: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A changed byte, a missing, an extra or a climbing member, another image, or no tar: nothing is put into the store."""
    images_dir, tagged, other = store
    whole = tmp_path / "whole.tar"
    main(["export", tagged, str(whole), "--images", str(images_dir)])
    content = whole.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    odd = {
        "changed": _tar([(name, text.replace(b"one", b"two")) for name, text in members]),
        "missing": _tar(members[:-1]),
        "extra": _tar([*members, ("more", b"x")]),
        "twice": _tar([*members, members[1]]),
        "climbing": _tar([members[0], ("../" + members[1][0], members[1][1]), *members[2:]]),
        "headless": _tar(members[1:]),
        "short": content[:1500],
        "noise": os.urandom(4096),
        "empty": b"",
    }
    for name, text in odd.items():
        (tmp_path / "odd.tar").write_bytes(text)
        arguments = ["import", str(tmp_path / "odd.tar"), "--images", str(tmp_path / "there")]
        assert _fault(capsys, *arguments) in ("image_file_invalid", "image_corrupt"), name
    arguments = ["import", str(whole), "--images", str(tmp_path / "there"), "--digest", other]
    assert _fault(capsys, *arguments) == "image_file_invalid"
    assert not list((tmp_path / "there").glob("sha256-*"))
    assert not list((tmp_path / "there").glob(f"{STAGING_PREFIX}*"))


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def test_a_tagged_image_is_removed_by_force_only(
    store: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What a tag points at is what sandboxes will start from; with --force image and tag go together."""
    images_dir, tagged, other = store
    assert _fault(capsys, "rm", "base:latest", "--images", str(images_dir)) == "image_tagged"
    assert main(["rm", other[:20], "--images", str(images_dir)]) == 0
    assert main(["rm", tagged, "--force", "--images", str(images_dir)]) == 0
    assert (read_tag(images_dir, "base:latest"), list(images_dir.glob("sha256-*"))) == (None, [])


def test_a_broken_image_can_be_removed(store: tuple[Path, str, str]) -> None:
    """The way out of a damaged store is open: an image that cannot be read can still be named."""
    images_dir, _, other = store
    (image_path(images_dir, other) / MANIFEST_NAME).write_text("broken")
    assert main(["rm", other, "--images", str(images_dir)]) == 0


@pytest.mark.parametrize("name", ["sha256:", "absent:latest", "sha256:" + "0" * 64, "../images"])
def test_an_image_that_is_not_there_is_not_found(
    store: tuple[Path, str, str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A name means one image or none, and never a path."""
    assert _fault(capsys, "inspect", name, "--images", str(store[0])) == "image_not_found"


def test_unused_images_are_collected(store: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run names what would go and touches nothing; a use that hostd noted keeps an image; a tag always does."""
    images_dir, tagged, other = store
    for digest in (tagged, other):
        os.utime(image_path(images_dir, digest) / MANIFEST_NAME, (1, 1))
    arguments = ["gc", "--json", "--keep", "0", "--images", str(images_dir)]
    assert main([*arguments, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == [other]
    (images_dir / "used").mkdir()
    (images_dir / "used" / other.removeprefix("sha256:")).touch()
    main(arguments)
    assert json.loads(capsys.readouterr().out)["removed"] == []
    os.utime(images_dir / "used" / other.removeprefix("sha256:"), (1, 1))
    main(arguments)
    found = json.loads(capsys.readouterr().out)
    assert (found["removed"], found["freed_bytes"] > 0) == ([other], True)
    assert [path.name for path in images_dir.glob("sha256-*")] == [image_path(images_dir, tagged).name]
    assert list((images_dir / "used").iterdir()) == []


def test_a_duration_is_a_number_and_a_unit(store: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong limit removes nothing."""
    assert _fault(capsys, "gc", "--keep-used-within", "7 days", "--images", str(store[0])) == "duration_invalid"


def test_the_listing_fits_a_terminal(store: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """80 columns for people, every field for programs."""
    images_dir, tagged, _ = store
    main(["ls", "--images", str(images_dir)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
    main(["ls", "--json", "--images", str(images_dir)])
    listed = {one["digest"]: one for one in json.loads(capsys.readouterr().out)}
    assert listed[tagged]["tags"] == ["base:latest"]


def test_a_name_says_which_image_is_meant(store: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """The beginning of a digest, of any length, is enough where it is one image's; nothing at all is never one."""
    images_dir, _, other = store
    for length in range(5, 12):
        name = other.removeprefix("sha256:")[:length]
        assert main(["verify", name, "--images", str(images_dir)]) == 0
    assert main(["rm", other, "--images", str(images_dir)]) == 0
    capsys.readouterr()
    for name in ("", "sha256:"):
        assert _fault(capsys, "rm", name, "--force", "--images", str(images_dir)) == "image_not_found"


def test_a_name_without_a_tag_is_the_latest(store: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """As in a jcard; and what is shown of an image fits a terminal."""
    images_dir, tagged, _ = store
    assert main(["inspect", "base", "--images", str(images_dir)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == tagged
    assert max(map(len, shown)) <= 80
    assert _fault(capsys, "inspect", "other", "--images", str(images_dir)) == "image_not_found"
    assert main(["verify", "base", "--images", str(images_dir)]) == 0
    assert main(["rm", "base", "--images", str(images_dir)]) == 1
    shown = capsys.readouterr()
    assert max(map(len, [*shown.out.splitlines(), *shown.err.splitlines()])) <= 80
    assert "next: " in shown.err
