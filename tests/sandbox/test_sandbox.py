import os
import time
from pathlib import Path

import pytest

from flowrl_kernels.trainer.config import TaskConfig
from flowrl_kernels.trainer.reward import Scorer, find_reward
from flowrl_kernels.trainer.sandbox import Ended, Limits, Pool, SandboxUnavailable, Watch, box, launch
from flowrl_kernels.trainer.tasks import code
from flowrl_kernels.trainer.tasks.sums import Sums

pytestmark = pytest.mark.usefixtures("sandbox")


class Run:
    """One program on one input, and its sandbox until the end of the test."""

    def __init__(self):
        self.pool = Pool(spare=0)
        self.boxes = []

    def __call__(self, source, stdin="", seconds=10.0, told=None, **limits):
        limits = Limits(seconds=seconds, **limits)
        self.box = self.pool.take()
        self.boxes.append(self.box)
        until, watched = time.monotonic() + seconds, [Watch(self.box, limits)]
        self.box.send({"role": "programs", "source": source, "limits": limits.resources()}, until, watched)
        self.box.send({"stdin": stdin, "seconds": told or seconds, "output": limits.output}, until, watched)
        return self.box.receive(until, watched)


@pytest.fixture
def run():
    runner = Run()
    yield runner
    for made in runner.boxes:
        made.close()


def test_a_program_sees_the_interpreter_and_nothing_of_this_machine(run):
    source = """if True:
        import os
        print(os.getuid(), len(os.environ), os.getcwd(), sorted(os.listdir("/tmp")))
        for path in ("/proc", "/sys", "/home", "/etc/passwd", "/usr/bin", "/bin", "/work", "/var", "/opt", "/run"):
            print(path, os.path.exists(path))
        library = os.path.dirname(os.__file__)
        print([os.listdir(f"{library}/{n}") for n in os.listdir(library) if n.endswith("-packages")])
    """
    lines = run(source)["stdout"].splitlines()
    first, rest = lines[0].split(), lines[1:-1]
    assert first[0] == str(launch.USER)
    assert int(first[1]) <= 3  # numpy's threads, where there is numpy
    assert first[2:] == ["/tmp", "[]"]
    assert all(line.endswith(" False") for line in rest), rest
    assert lines[-1] in ("[]", "[[]]", "[[], []]")


def test_a_program_can_write_to_tmp_and_nowhere_else(run):
    source = """if True:
        import os
        folders = {os.path.join(top, name) for top, names, _ in os.walk("/") for name in names} | {"/"}
        for folder in folders:
            try:
                os.close(os.open(folder + "/written", os.O_CREAT | os.O_WRONLY))
                print(folder)
            except OSError:
                pass
    """
    assert sorted(run(source)["stdout"].split()) == ["/dev/shm", "/tmp"]  # one a link to the other


def test_every_namespace_is_its_own(run):
    run("print(1)")
    for kind in ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts"):
        inside, here = (os.readlink(f"/proc/{pid}/ns/{kind}") for pid in (run.box.pid, "self"))
        assert inside != here, kind


def test_every_process_is_filtered_and_can_gain_nothing(run):
    run("print(1)")
    for pid in (run.box.pid, *box._children(run.box.pid)):
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert status["NoNewPrivs"] == "1"
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert status["Seccomp"] == "2"


USUAL = {
    "threads": "from concurrent.futures import ThreadPoolExecutor as T\nprint(T(2).submit(lambda: 42).result())",
    "processes": "import multiprocessing as m\nwith m.Pool(2) as p: print(p.map(abs, [-42])[0])",
    "coroutines": "import asyncio\nasync def f(): await asyncio.sleep(.01); return 42\nprint(asyncio.run(f()))",
    "extension modules": "import sqlite3, ssl, hashlib, zlib, bz2, lzma, ctypes, decimal, uuid, datetime; print(42)",
    "another Python": "import subprocess as s, sys\ns.run([sys.executable, '-S', '-c', 'print(42)'])",
    "files": "import tempfile as t, shutil\nf = t.NamedTemporaryFile('w'); f.write('42'); f.flush()\n"
    "shutil.copy(f.name, '/tmp/y'); print(open('/tmp/y').read())",
    "deep recursion": "import sys, threading\nsys.setrecursionlimit(10**6); threading.stack_size(1 << 27)\n"
    "def f(n): return n and f(n - 1) + 1\n"
    "t = threading.Thread(target=lambda: print(f(50000) - 49958)); t.start(); t.join()",
    "fast input": "import os, io\nprint(int(io.BytesIO(os.read(0, os.fstat(0).st_size or 8192)).readline()))",
}


@pytest.mark.parametrize("what", USUAL)
def test_what_ordinary_programs_do_works(what, run):
    answer = run(USUAL[what], "42\n")
    assert (answer["stdout"].strip(), answer["code"]) == ("42", 0), answer


def test_output_input_exit_code_and_errors_come_out(run):
    answer = run("import sys\nprint(input()[::-1])\nprint('why', file=sys.stderr)\nsys.exit(7)", "abc\n")
    assert answer == {"how": "exit", "code": 7, "stdout": "cba\n", "stderr": "why\n"}


def test_large_input_that_is_never_read_and_large_output_do_not_hang(run):
    assert run("print('x' * 500_000)", "y" * 3_000_000)["stdout"] == "x" * 500_000 + "\n"
    assert run("import sys; print(len(sys.stdin.read()))", "y" * 3_000_000)["stdout"] == "3000000\n"
    assert run("while True: print('x' * 1000)", output=1000)["how"] == "output"


def test_what_is_registered_for_the_end_runs_and_threads_are_waited_for(run):
    source = """if True:
        import atexit, threading, time
        atexit.register(print, "last")
        threading.Thread(target=lambda: (time.sleep(.05), print("thread"))).start()
        print("main")
    """
    assert run(source)["stdout"] == "main\nthread\nlast\n"


def test_a_daemon_does_not_hold_the_answer_up_and_does_not_survive_it(run):
    source = """if True:
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        print("left")
    """
    start = time.monotonic()
    assert run(source, seconds=30.0)["stdout"] == "left\n"
    assert time.monotonic() - start < 20
    until = time.monotonic() + 10
    while len(box._children(run.box.pid)) > 1:  # the harness alone is to stay
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_deadline_takes_every_process_along(run):
    source = "import os, time\nfor _ in range(3): os.fork() or os.setsid()\ntime.sleep(1000)"
    with pytest.raises(Ended, match="time"):
        run(source, seconds=1.0, told=100.0)  # the harness is told a longer time: it is the host who kills
    tree = [run.box.pid]
    for pid in tree:
        tree += box._children(pid)
    assert len(tree) == 2 + 8  # the first process, the harness, the program and its children
    run.box.close()
    assert [pid for pid in tree if Path(f"/proc/{pid}").exists()] == []
    assert run.box._process.returncode is not None


def test_memory_is_bounded_for_one_process_and_for_all_together(run):
    assert "MemoryError" in run("x = bytearray(400 << 20)", memory=256 << 20)["stderr"]
    source = """if True:
        import os, time
        for _ in range(5):
            if os.fork() == 0:
                x = bytearray(100 << 20)
                time.sleep(1000)
        time.sleep(1000)
    """
    with pytest.raises(Ended, match="memory"):
        run(source, seconds=60.0, memory=256 << 20)


def test_disk_and_inodes_are_bounded(run):
    source = """if True:
        n = 0
        try:
            for i in range(99): n += open(f"/tmp/{i}", "wb").write(b"x" * (1 << 20))
        except OSError as error: print(error.errno, n < 40 << 20)
    """
    assert run(source)["stdout"] == "28 True\n"
    with pytest.raises(Ended, match="disk"):
        run("import os\nwhile True:\n  for i in range(10**6): os.close(os.open(f'/tmp/{i}', os.O_CREAT))", seconds=60.0)


def test_processes_are_bounded(run):
    source = """if True:
        import os, time
        n = 0
        try:
            while os.fork(): n += 1
            time.sleep(100)
        except OSError as error: print(n, error.errno)
    """
    made, error = map(int, run(source)["stdout"].split())
    assert made < 16
    assert error == 11


def test_limits_cannot_be_raised_again(run):
    source = """if True:
        import resource
        for name in ("AS", "CPU", "FSIZE", "NOFILE", "NPROC", "CORE"):
            for value in (-1, 1 << 40):
                try: resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value)); print(name)
                except (ValueError, OSError): pass
        print("none")
    """
    assert run(source)["stdout"] == "none\n"


def test_every_program_gets_a_sandbox_that_nobody_used(run):
    leave = "open('/tmp/left', 'w').write('x'); import builtins; builtins.left = 1; print(1)"
    assert run(leave)["stdout"] == "1\n"
    see = "import os, builtins; print(os.path.exists('/tmp/left'), hasattr(builtins, 'left'))"
    assert run(see)["stdout"] == "False False\n"


def test_inputs_of_one_program_get_a_process_each(run):
    assert run("import builtins; print(hasattr(builtins, 'n')); builtins.n = 1")["stdout"] == "False\n"
    until = time.monotonic() + 10
    run.box.send({"stdin": "", "seconds": 5, "output": 100}, until, [])
    assert run.box.receive(until, [])["stdout"] == "False\n"


def test_a_warm_one_is_there_at_once_and_its_successor_starts_meanwhile():
    pool = Pool(spare=1)
    pool.fill()
    first = pool.take()
    pool.fill()
    assert len(pool._waiting) == 1
    second = pool.take()
    assert first.pid != second.pid
    for made in (first, second):
        made.close()
        made.close()  # twice does no harm
    pool.close()


def test_root_s_sandboxes_run_as_users_that_nobody_else_has(run):
    run("print(1)")
    uid = os.stat(f"/proc/{run.box.pid}").st_uid
    assert uid == (launch.user(0) if os.geteuid() == 0 else os.geteuid())
    assert uid != 0
    run("print(1)")
    if os.geteuid() == 0:
        assert os.stat(f"/proc/{run.box.pid}").st_uid == launch.user(1) != uid


def test_a_container_with_few_users_has_one_for_a_sandbox_too(monkeypatch):
    assert launch.user(0) != launch.user(1)
    monkeypatch.setattr(launch, "_users", lambda: [(0, 1), (1, 65536)])
    found = {launch.user(slot) for slot in range(64)}
    assert len(found) == 64
    assert all(32769 <= uid < 65537 for uid in found)


def test_the_sandbox_dies_with_its_host(tmp_path):
    import subprocess
    import sys

    text = """if True:
        import os, time
        from flowrl_kernels.trainer.sandbox import Pool
        made = Pool().take()
        print(made.pid, flush=True)
        time.sleep(1000)
    """
    host = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    pid = int(host.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    host.kill()
    host.wait()
    host.stdout.close()
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("broken", ["missing", "failing", "wall with a hole"])
def test_without_a_sandbox_code_rewards_are_refused_by_name(broken, monkeypatch):
    code.close_pool()
    if broken == "missing":
        monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    elif broken == "failing":
        monkeypatch.setattr(launch, "bubblewrap", lambda: "/bin/false")
    else:
        monkeypatch.setattr(code, "_PROBE", "print('no file')\nprint('a socket')")
    with pytest.raises(ValueError, match=r"task\.reward = 'code' needs a sandbox, and none can run here: "):
        find_reward("code")
    with pytest.raises(ValueError, match="needs a sandbox"):
        Scorer(TaskConfig(name="file", reward="code"), Sums())


def test_a_start_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(launch, "bubblewrap", lambda: "/nowhere/bwrap")
    with pytest.raises(SandboxUnavailable, match="/nowhere/bwrap|No such file"):
        Pool().take()


def test_frames_that_lie_about_themselves_end_the_program():
    import socket

    made = box.Sandbox.__new__(box.Sandbox)
    for sent, why in ((b"\xff\xff\xff\xff{}", "garbage"), (b"\0\0\0\x05[[[[[", "garbage"), (b"\0\0", "died")):
        made.socket, theirs = socket.socketpair()
        theirs.sendall(sent)
        theirs.close()
        with pytest.raises(Ended, match=why):
            made.receive(time.monotonic() + 5, [])
        made.socket.close()
