"""Every online verb as a process of its own, over mutual TLS, against the real scheduler and a host's real services."""

import hashlib
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fleet.identity import Role
from fleet.model.ids import Digest
from fleet.store.memory import MemoryStore
from mb.exits import Exit
from tests.integration.mb.parts import Ended, Mb, end_of
from tests.integration.scheduler.parts import Fleet, ObedientHost
from tests.unit.mb.build import Member, artifact_of

# A host's source store builds EROFS disks.
pytestmark = pytest.mark.root

LISTED: list[dict[str, Any]] = [
    {"path": "src/a.py", "kind": "modified"},
    {"path": "src/new file.sh", "kind": "added"},
    {"path": "old name.txt", "kind": "deleted"},
    {"path": ".git/hooks/x", "kind": "added"},
]
MEMBERS = [
    Member("0/src/a.py", "one\n2\n"),
    Member("0/src/new file.sh", "#!/bin/sh", mode=0o755),
    Member("0/.git/hooks/x", "#!", mode=0o755),
]
ARTIFACT = artifact_of(LISTED, MEMBERS)


def digest_of(content: bytes) -> Digest:
    return Digest("sha256:" + hashlib.sha256(content).hexdigest())


async def submit(mb: Mb, tree: Path, *options: str) -> str:
    """The id of a sandbox that was started and let go."""
    ended = await mb.run("up", tree, "--detach", "--json", *options)
    assert ended.code == 0, ended.stderr
    sandbox_id: str = ended.value()["sandbox_id"]
    return sandbox_id


async def complete(local: ObedientHost, sandbox_id: str, artifact: bytes = ARTIFACT) -> None:
    """The sandbox runs, prints and ends well."""
    await local.ordered(sandbox_id)
    await local.start(sandbox_id)
    await local.print(sandbox_id, b"working\n")
    await local.finish(sandbox_id, artifact, digest_of(artifact))


async def ordered_id(local: ObedientHost) -> str:
    """The id of the first sandbox that reaches the host."""
    while True:
        changed = local.changes.subscribe()
        if local.orders.orders:
            return next(iter(local.orders.orders))
        await changed.wait()


async def test_up_follows_to_the_end(mb: Mb, local: ObedientHost, tree: Path) -> None:
    """Output on stdout and nothing else, progress and the summary on stderr, exit 0 when every agent completed."""
    process = await mb.start("up", tree)
    await complete(local, await ordered_id(local))
    ended = await end_of(process)
    assert (ended.code, ended.stdout) == (Exit.OK, "working\n")
    for part in ("packed", "sent", "assigned to host local", "completed", "worker completed, exit 0", "mb diff run"):
        assert part in ended.stderr, part


async def test_up_prints_one_object_for_programs(mb: Mb, local: ObedientHost, tree: Path) -> None:
    """With --json stdout is JSON and nothing else; --rm leaves nothing behind."""
    process = await mb.start("up", tree, "--json", "--rm", "--name", "other")
    await complete(local, await ordered_id(local))
    ended = await end_of(process)
    assert ended.code == Exit.OK
    assert (ended.value()["phase"], ended.value()["spec"]["name"]) == ("completed", "other")
    assert "working" in ended.stderr
    assert (await mb.run("ls", "--json")).value() == []


async def test_up_that_is_interrupted_lets_go(mb: Mb, local: ObedientHost, tree: Path) -> None:
    """Ctrl-C ends mb, not the sandbox, and says how to go on."""
    process = await mb.start("up", tree)
    sandbox_id = await ordered_id(local)
    await local.start(sandbox_id)
    await local.print(sandbox_id, b"working\n")
    assert process.stdout is not None
    assert await process.stdout.readline() == b"working\n"
    process.send_signal(signal.SIGINT)
    ended = await end_of(process)
    assert ended.code == Exit.INTERRUPTED
    assert "mb logs run --follow" in ended.stderr
    assert (await mb.run("status", "run", "--json")).value()["phase"] == "running"


async def test_up_of_a_sandbox_that_is_stopped(mb: Mb, local: ObedientHost, tree: Path) -> None:
    """A sandbox that did not complete is told by the exit code."""
    process = await mb.start("up", tree)
    await ordered_id(local)
    stopped = await mb.run("stop", "run")
    assert stopped.code == 0, stopped.stderr
    ended = await end_of(process)
    assert (ended.code, ended.stdout) == (Exit.ENDED_BADLY, "")
    assert "stopped" in ended.stderr


async def test_a_sandbox_without_room_is_pending_with_counts(mb: Mb, local: ObedientHost, tree: Path) -> None:
    """A full fleet refuses with reasons, and the sandbox waits; stopping it ends the wait."""
    text = (tree / "jcard.toml").read_text()
    (tree / "jcard.toml").write_text(text.replace("cpus = 1", "cpus = 200"))
    process = await mb.start("up", tree)
    assert process.stderr is not None
    lines = []
    while b"pending" not in (line := await process.stderr.readline()):
        assert line, lines
        lines.append(line)
    assert b"no room on 1 host: vcpu_too_large (1 host)" in line
    shown = await mb.run("status", "run")
    assert "vcpu_too_large, 1 host:" in shown.stdout
    assert (await mb.run("destroy", "run")).code == 0
    assert (await end_of(process)).code == Exit.ENDED_BADLY


async def test_a_placement_is_explained_and_made_again(mb: Mb, local: ObedientHost, tree: Path) -> None:
    """The host with its terms as of now, and the past decision, the same byte for byte: exit 0."""
    await local.ordered(await submit(mb, tree))
    told = await mb.run("explain", "run")
    assert told.code == 0, told.stderr
    assert "is on host local" in told.stdout
    assert "* local" in told.stdout
    again = await mb.run("explain", "run", "--recompute")
    assert again.code == 0, again.stdout + again.stderr
    assert again.stdout.rstrip().endswith("the same decision, byte for byte")
    checks = (await mb.run("explain", "run", "--recompute", "--json")).value()["checks"]
    assert [one["name"] for one in checks if one["recorded"] != one["found"]] == []


async def test_the_same_request_is_the_same_sandbox(mb: Mb, local: ObedientHost, tree: Path) -> None:
    """An id makes `up` safe to repeat; another spec under it is refused, and so is a name that is taken."""
    sandbox_id = await submit(mb, tree)
    assert await submit(mb, tree, "--id", sandbox_id) == sandbox_id
    other = await mb.run("up", tree, "--detach", "--id", sandbox_id, "--name", "else", "--json")
    assert (other.code, other.error()["code"]) == (Exit.ERROR, "id_reused")
    again = await mb.run("up", tree, "--detach", "--json")
    assert (again.code, again.error()["code"]) == (Exit.ERROR, "name_taken")


async def test_many_of_one_jcard(mb: Mb, local: ObedientHost, tree: Path) -> None:
    """`--count` asks for numbered sandboxes, safe to repeat by the first id; `--gang` makes them one group."""
    options = ("--count", "3", "--gang", "--id", "abcdefghijkl", "--json")
    ended = await mb.run("up", tree, *options)
    assert ended.code == 0, ended.stderr
    made = ended.value()
    assert [one["spec"]["name"] for one in made] == ["run-0", "run-1", "run-2"]
    groups = {(one["spec"]["placement"]["group"], one["spec"]["placement"]["group_size"]) for one in made}
    assert groups == {("up-abcdefghijkl", 3)}
    again = (await mb.run("up", tree, *options)).value()
    assert [one["sandbox_id"] for one in again] == [one["sandbox_id"] for one in made]
    for one in made:
        await local.ordered(one["sandbox_id"])
    taken = await mb.run("up", tree, "--count", "4", "--json")
    assert (taken.code, taken.error()["code"]) == (Exit.ERROR, "name_taken")
    assert [one["spec"]["name"] for one in taken.value()] == ["run-3"]


async def test_a_source_is_sent_once(mb: Mb, local: ObedientHost, tree: Path) -> None:
    """A tree that a host holds is not sent again."""
    await submit(mb, tree)
    again = await mb.run("up", tree, "--detach", "--name", "second")
    assert "the fleet holds it already" in again.stderr


async def test_sandboxes_and_hosts_are_listed(mb: Mb, local: ObedientHost, fleet: Fleet, tree: Path) -> None:
    """A tenant sees its own; an operator sees all, and the hosts, which a tenant may not."""
    sandbox_id = await submit(mb, tree)
    operator = Mb(fleet, tree.parent, Role.OPERATOR, "operator")
    assert sandbox_id in (await mb.run("ls")).stdout
    assert [one["sandbox_id"] for one in (await operator.run("ls", "--json")).value()] == [sandbox_id]
    assert (await Mb(fleet, tree.parent, Role.TENANT, "other").run("ls")).stdout == "no sandboxes; mb up starts one\n"
    hosts = await operator.run("host", "ls")
    assert hosts.stdout.splitlines()[1].split()[:3] == ["local", "alive", "kvm"]
    refused = await mb.run("host", "ls", "--json")
    assert (refused.code, refused.error()["code"]) == (Exit.ERROR, "role_not_permitted")


async def test_output_is_read_from_any_byte(mb: Mb, local: ObedientHost, tree: Path) -> None:
    """So far, from an offset, and to the end with --follow; an agent that is not there is named."""
    sandbox_id = await submit(mb, tree)
    await local.ordered(sandbox_id)
    await local.start(sandbox_id)
    await local.print(sandbox_id, b"one\xff\n")
    process = await mb.start("logs", "run", "--follow", "--offset", "2")
    assert process.stdout is not None
    assert await process.stdout.readline() == b"e\xff\n"
    assert (await mb.run("logs", "run", "worker", "--json")).value()["next_offset"] == 5
    await complete(local, sandbox_id)
    assert (await end_of(process)).stdout == "working\n"
    assert (await mb.run("logs", "run", "nobody")).code == Exit.INVALID


async def test_a_diff_is_what_git_applies(mb: Mb, local: ObedientHost, tree: Path, tmp_path: Path) -> None:
    """`mb diff | git apply` gives exactly the sandbox's tree, modes and deletions included."""
    await complete(local, await submit(mb, tree))
    diff = await mb.run("diff", "run")
    assert diff.code == 0, diff.stderr
    assert "1 change in .git not shown" in diff.stderr
    (tmp_path / "diff").write_text(diff.stdout)
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    subprocess.run(["git", "apply", tmp_path / "diff"], cwd=tree, check=True)
    assert (tree / "src" / "a.py").read_text() == "one\n2\n"
    assert (tree / "src" / "new file.sh").stat().st_mode & 0o111
    assert not (tree / "old name.txt").exists()


async def test_a_diff_is_summed_up(mb: Mb, local: ObedientHost, tree: Path) -> None:
    """--stat for people, --json for programs."""
    await complete(local, await submit(mb, tree))
    stat = (await mb.run("diff", "run", "--stat", "--with-git")).stdout
    assert stat.splitlines()[-1] == "4 paths, +3 -2"
    (source,) = (await mb.run("diff", "run", "--json")).value()["sources"]
    assert [change["path"] for change in source["changes"]] == ["old name.txt", "src/a.py", "src/new file.sh"]
    assert source["hidden_git_changes"] == 1


async def test_changes_are_brought_home(mb: Mb, local: ObedientHost, tree: Path, tmp_path: Path) -> None:
    """Over the tree they came from, deletions when asked, never over what was changed here, never into .git."""
    await complete(local, await submit(mb, tree))
    ended = await mb.run("get", "run", tree, "--delete")
    assert ended.code == 0, ended.stderr
    assert sorted(path.name for path in tree.rglob("*")) == ["a.py", "jcard.toml", "new file.sh", "src"]
    assert "1 path: git would run what is in it" in ended.stderr
    (tree / "src" / "a.py").write_text("mine\n")
    refused = await mb.run("get", "run", tree)
    assert (refused.code, (tree / "src" / "a.py").read_text()) == (Exit.ERROR, "mine\n")
    assert (await mb.run("get", "run", "--tar", tmp_path / "a.tar")).code == 0
    assert (tmp_path / "a.tar").read_bytes() == ARTIFACT
    assert (await mb.run("get", "run", "--tar", tmp_path / "a.tar")).code == Exit.ERROR


async def test_an_artifact_with_a_flipped_byte_is_refused(mb: Mb, local: ObedientHost, tree: Path) -> None:
    """What a host sends is believed only with its digest."""
    sandbox_id = await submit(mb, tree)
    await local.ordered(sandbox_id)
    await local.finish(sandbox_id, ARTIFACT[:-1] + b"x", digest_of(ARTIFACT))
    for arguments in (["diff", "run"], ["get", "run"], ["get", "run", "--tar", "/nonexistent/a.tar"]):
        assert (await mb.run(*arguments)).code != 0
    assert (await mb.run("diff", "run", "--json")).error()["code"] == "digest_mismatch"


async def test_an_artifact_that_climbs_is_refused(mb: Mb, local: ObedientHost, tree: Path, tmp_path: Path) -> None:
    """A guest that names paths outside writes nothing at all."""
    evil = artifact_of([{"path": "../evil", "kind": "added"}], [Member("0/../evil", "x")])
    await complete(local, await submit(mb, tree), evil)
    ended = await mb.run("get", "run", tmp_path / "dest", "--force", "--json")
    assert (ended.code, ended.error()["code"]) == (Exit.INVALID, "tar_invalid")
    assert not (tmp_path / "dest").exists()
    assert not (tmp_path / "evil").exists()


async def test_results_that_are_not_there_yet(mb: Mb, local: ObedientHost, tree: Path) -> None:
    """Asking too early, or for what does not exist, says so."""
    await submit(mb, tree)
    early: Ended = await mb.run("diff", "run", "--json")
    assert (early.code, early.error()["code"]) == (Exit.ERROR, "artifact_missing")
    for verb in ("status", "logs", "diff", "get", "stop", "destroy"):
        gone = await mb.run(verb, "nobody", "--json")
        assert (gone.code, gone.error()["code"]) == (Exit.ERROR, "sandbox_unknown"), verb


async def test_destroy_waits_until_it_is_gone(mb: Mb, local: ObedientHost, tree: Path) -> None:
    """After it returns there is nothing, and the name is free."""
    await submit(mb, tree)
    assert (await mb.run("destroy", "run")).stdout == "run is removed\n"
    assert (await mb.run("ls", "--json")).value() == []
    await submit(mb, tree)
    assert (await mb.run("destroy", "run", "--no-wait", "--json")).value()[0]["is_removed"] is False


async def test_up_survives_a_restart_of_the_scheduler(
    store: MemoryStore, local: ObedientHost, tree: Path, pki: Path
) -> None:
    """A broken connection costs nothing: progress and output go on where they were, without gap or repetition."""
    second = Fleet(store, pki)
    follower = Mb(second, tree.parent)
    async with second.running():
        process = await follower.start("up", tree)
        sandbox_id = await ordered_id(local)
        await local.start(sandbox_id)
        await local.print(sandbox_id, b"before\n")
        assert process.stdout is not None
        assert await process.stdout.readline() == b"before\n"
    async with second.running():
        await complete(local, sandbox_id)
        ended = await end_of(process)
    assert (ended.code, ended.stdout) == (Exit.OK, "working\n")
    assert "trying again" in ended.stderr


async def test_a_diff_of_binary_files_is_what_git_applies(
    mb: Mb, local: ObedientHost, tree: Path, tmp_path: Path
) -> None:
    """Binary files that are new, changed and gone, and a file that became a symlink, all through `git apply`."""
    blob = bytes(range(256)) * 40
    (tree / "changed.bin").write_bytes(b"\0old" + blob)
    (tree / "gone.bin").write_bytes(b"\0gone")
    (tree / "linked").write_text("text\n")
    listed = [
        {"path": "changed.bin", "kind": "modified"},
        {"path": "gone.bin", "kind": "deleted"},
        {"path": "linked", "kind": "modified"},
        {"path": "new.bin", "kind": "added"},
    ]
    text = "\0" + "".join(map(chr, range(1, 128))) * 50
    members = [Member("0/changed.bin", text), Member("0/linked", link="jcard.toml"), Member("0/new.bin", "\0new")]
    await complete(local, await submit(mb, tree), artifact_of(listed, members))
    diff = await mb.run("diff", "run")
    assert diff.code == 0, diff.stderr
    (tmp_path / "diff").write_text(diff.stdout)
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    subprocess.run(["git", "apply", tmp_path / "diff"], cwd=tree, check=True)
    assert (tree / "changed.bin").read_bytes() == text.encode()
    assert (tree / "new.bin").read_text() == "\0new"
    assert not (tree / "gone.bin").exists()
    assert (tree / "linked").readlink() == Path("jcard.toml")
