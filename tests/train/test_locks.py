"""One process works in a directory at a time; what a killed one leaves is taken over and removed."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from cli import assert_fails
from raw_lines import raw_lines

from ctr_train.data.prepare import prepare
from ctr_train.errors import UserError
from ctr_train.files import atomic_path, read_record, write_record
from ctr_train.locks import claim, lock, release, sweep, sweep_all, temporary_name

HOLDER = """
import sys
from pathlib import Path
from ctr_train.locks import claim, lock
with lock(Path(sys.argv[1]), "it"):
    claims = [claim(Path(name), directory=name.endswith("d.tmp")) for name in sys.argv[2:]]
    print("held", flush=True)
    sys.stdin.read()
"""
QUICK = ("--model", "dcnv2", "--recipe", "small", "--epochs", "1", "--batch-size", "256")


@pytest.fixture
def hold():
    """(lock file, claimed names) -> a process that holds them."""
    processes = []

    def start(*names) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", HOLDER, *map(str, names)], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_run_directory_in_use_is_refused_by_the_name_of_its_holder(prepared, tmp_path, ctr_train, hold):
    (tmp_path / "run").mkdir()
    holder = hold(tmp_path / "run" / ".lock")
    sentence = f"run is in use by process {holder.pid} on {socket.gethostname()} (-c): wait until it has ended, or"
    assert_fails(ctr_train(*QUICK, "--data", prepared, "--out", "run"), sentence)
    assert_fails(ctr_train(*QUICK, "--data", prepared, "--out", "run", "--skip-if-done"), sentence)
    kill(holder)
    (tmp_path / "run" / ".best.pt.0123456789abcdef.tmp").write_bytes(b"half a checkpoint")
    done = ctr_train(*QUICK, "--data", prepared, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    holder = hold(tmp_path / "run" / ".lock")
    shown = ctr_train("--resume", "--out", "run")  # a finished run is only read
    assert shown.returncode == 0 and shown.stdout == done.stdout
    (tmp_path / "run" / "gold.json").unlink()
    assert_fails(ctr_train("--resume", "--out", "run"), f"process {holder.pid} on ")


def test_a_directory_that_rows_are_prepared_for_is_refused(tmp_path, hold):
    (tmp_path / "a.tsv").write_text("".join(line + "\n" for line in raw_lines(50)))
    holder = hold(tmp_path / ".out.lock")
    with pytest.raises(UserError, match=rf"out is in use by process {holder.pid} on "):
        prepare([tmp_path / "a.tsv"], tmp_path / "out")
    kill(holder)
    (tmp_path / ".out.0123456789abcdef.tmp").mkdir()
    (tmp_path / ".out.0123456789abcdef.tmp" / "train.arrow").write_bytes(b"half")
    prepare([tmp_path / "a.tsv"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv", "out"]


def test_data_whose_replacement_was_killed_come_back(tmp_path):
    (tmp_path / "a.tsv").write_text("".join(line + "\n" for line in raw_lines(50)))
    prepare([tmp_path / "a.tsv"], tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    (tmp_path / "b.tsv").write_text("broken\n")
    with pytest.raises(UserError, match="b.tsv, line 1"):
        prepare([tmp_path / "b.tsv"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv", "b.tsv", "out"]


def test_only_what_the_dead_left_is_swept(tmp_path, hold):
    target = tmp_path / "x.json"
    living = [temporary_name(target), tmp_path / f".x.json.{'a' * 15}d.tmp"]
    dead = [temporary_name(target), tmp_path / f".x.json.{'b' * 15}d.tmp"]
    alive = hold(tmp_path / "one", *living)
    kill(hold(tmp_path / "two", *dead))
    other = temporary_name(tmp_path / "y.json")
    other.write_text("another file's")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert [path.exists() for path in (*living, *dead, other)] == [True, True, False, False, True]
    kill(alive)
    sweep(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "one", "two", "x.json"]


def test_two_writers_of_one_file_never_meet(tmp_path):
    with atomic_path(tmp_path / "x") as first, atomic_path(tmp_path / "x") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "x").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_lock_ends_with_its_block_and_names_nobody_where_the_disk_is_full(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="it is in use by process"), lock(tmp_path / "l", "it"), \
            lock(tmp_path / "l", "it"):
        pass
    assert not (tmp_path / "l").exists()
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="it is in use by another process"), lock(tmp_path / "l", "it"), \
            lock(tmp_path / "l", "it"):
        pass


def test_where_there_are_no_locks_work_goes_on_with_a_word(tmp_path, monkeypatch, capsys):
    import fcntl

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock(tmp_path / "l", "runs/x"):
        assert "see that no other process works on runs/x" in capsys.readouterr().err
        claimed = claim(temporary := temporary_name(tmp_path / "f"))
        sweep(tmp_path / "f")
        assert temporary.exists()  # nothing can be known of its owner
        release(claimed)


@pytest.mark.parametrize("name", ["/dev/null", "pipe"])
def test_what_is_no_regular_file_is_never_replaced(tmp_path, name):
    path = tmp_path / name
    if name == "pipe":
        os.mkfifo(path)
    with pytest.raises(UserError, match="it is no regular file"), atomic_path(path) as temporary:
        temporary.write_text("x")
    assert path.exists() and not path.is_file()


def test_a_record_is_read_only_as_it_was_written(tmp_path):
    path = tmp_path / "r.json"
    write_record(path, "run 3", {"a": 1, "b": [0.1, None]})
    assert read_record(path, "run 3") == {"a": 1, "b": [0.1, None]}
    with pytest.raises(UserError, match="is of the format 'ctr-kernels run 3', not 'ctr-kernels run 4'"):
        read_record(path, "run 4")
    for old, new in (("0.1", "0.2"), ('"a"', '"c"'), ("null", "true"), ('"checksum"', '"checksun"')):
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(UserError, match="is damaged, or was changed by hand"):
            read_record(path, "run 3")
        write_record(path, "run 3", {"a": 1, "b": [0.1, None]})


def test_what_others_have_put_there_stays(prepared, tmp_path, ctr_train):
    own = [tmp_path / "w" / ".notes.tmp", tmp_path / "w" / ".thesis.2024.tmp", tmp_path / ".out.backup.tmp"]
    (tmp_path / "w").mkdir()
    for path in own:
        path.write_text("mine")
    os.mkfifo(tmp_path / "w" / f".pipe.{'0' * 16}.tmp")  # not waited for
    assert ctr_train(*QUICK, "--data", prepared, "--out", "w").returncode == 0
    (tmp_path / "a.tsv").write_text("".join(line + "\n" for line in raw_lines(50)))
    prepare([tmp_path / "a.tsv"], tmp_path / "out")
    assert [path.read_text() for path in own] == ["mine"] * 3
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"\.out\.old holds something else than prepared data"):
        prepare([tmp_path / "a.tsv"], tmp_path / "out")
    assert (tmp_path / ".out.old" / "mine").read_text() == "mine"
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / ".lock").write_text("mine")
    assert_fails(ctr_train(*QUICK, "--data", prepared, "--out", "v"), ".lock is in the way, and no lock of this")
    assert (tmp_path / "v" / ".lock").read_text() == "mine"


def test_a_directory_that_is_moved_or_replaced_gets_nothing_more(tmp_path):
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run" / ".lock", "run") as check:
        check()
        (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(UserError, match="run was moved or removed while this process worked there"):
            check()
        (tmp_path / "run").mkdir()
        with lock(tmp_path / "run" / ".lock", "run") as other:  # another run takes the name
            with pytest.raises(UserError, match="run was moved or removed"):
                check()
            other()
    assert not list((tmp_path / "run").iterdir())


def test_a_moved_run_writes_no_checkpoint_under_its_old_name(make_trainer, tmp_path):
    def gone() -> None:
        raise UserError("run was moved or removed")

    trainer, stop = make_trainer("run", model="dcnv2", stop_after=3)
    trainer._still_here = gone
    with pytest.raises(UserError, match="moved or removed"):
        trainer.train(stop)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl"]


def test_names_as_long_as_a_file_system_has_them(tmp_path):
    path = tmp_path / ("x" * 255)
    dead = temporary_name(path)
    dead.write_text("half")
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_locks_of_nfs_need_a_descriptor_for_writing(tmp_path, monkeypatch):
    import fcntl

    flock = fcntl.flock

    def as_nfs(descriptor: int, operation: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    with atomic_path(tmp_path / "x") as temporary:
        temporary.write_text("x")
        sweep(tmp_path / "x")
        assert temporary.exists()
    (tmp_path / "a.tsv").write_text("".join(line + "\n" for line in raw_lines(50)))
    prepare([tmp_path / "a.tsv"], tmp_path / "out")
    dead = temporary_name(tmp_path / "y")
    dead.write_text("half")
    sweep_all(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv", "out", "x"]
