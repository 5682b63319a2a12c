"""The sandbox holds: what model-written code may not do fails in every backend that runs here."""

import platform
import socket
import struct
import threading

import pytest

from internjax.errors import Missing, UserError
from internjax.sandbox import BACKENDS, Backend, bubblewrap, choose_backend, run_python, seccomp


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    why_not = BACKENDS[request.param].why_not()
    if why_not:
        pytest.skip(f"{request.param}: {why_not}")
    return request.param


@pytest.fixture
def bwrap() -> str:
    if bubblewrap.why_not():
        pytest.skip(f"bubblewrap: {bubblewrap.why_not()}")
    return "bubblewrap"


def test_prints_and_returns_the_last_value(backend):
    result = run_python("x = 20\nprint('hello')\nx * 2 + 2", backend=backend)
    assert (result.stdout, result.value, result.error) == ("hello\n", "42", None)
    assert result.backend == backend
    assert not result.truncated


def test_errors_come_back_as_text(backend):
    result = run_python("print('before')\n1 / 0", backend=backend)
    assert result.stdout == "before\n"
    assert "ZeroDivisionError" in result.error
    assert run_python("def (", backend=backend).error


def test_runs_share_nothing(backend):
    run_python("x = 1", backend=backend)
    assert "NameError" in run_python("x", backend=backend).error


@pytest.mark.parametrize("text", ["grüße 你好 🙂", "a\\nb"])
def test_text_survives(backend, text):
    assert run_python(f"print({text!r})", backend=backend).stdout == text + "\n"


def test_files_outside_cannot_be_read(backend, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("mountain")
    for code in (f"open({str(secret)!r}).read()", "open('/etc/passwd').read()"):
        result = run_python(code, backend=backend)
        assert result.error
        assert result.value is None
    listing = f"import os\nprint(os.listdir({str(tmp_path)!r}))"
    assert "secret" not in run_python(listing, backend=backend).stdout


def test_files_outside_cannot_be_written(backend, tmp_path):
    target = tmp_path / "new.txt"
    code = f"import os\nos.makedirs({str(tmp_path)!r})\nopen({str(target)!r}, 'w').write('x')"
    assert run_python(code, backend=backend).error
    assert not target.exists()


def test_environment_is_hidden(backend, monkeypatch):
    monkeypatch.setenv("API_SECRET", "mountain")
    result = run_python("import os\nprint(dict(os.environ))", backend=backend)
    assert "mountain" not in f"{result.stdout}{result.value}{result.error}"


def test_loopback_is_out_of_reach(backend):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        assert run_python(code, backend=backend).error
        with pytest.raises(TimeoutError):
            server.accept()


def test_endless_loop_is_stopped(backend):
    result = run_python("while True: pass", backend=backend, timeout_seconds=1)
    assert "time" in result.error.lower()
    assert result.seconds < 4


def test_endless_sleep_is_stopped(backend):
    code = "import time\nwhile True: time.sleep(60)"
    result = run_python(code, backend=backend, timeout_seconds=1)
    assert "time" in result.error.lower()
    assert result.seconds < 4


@pytest.mark.parametrize("code", ["[0] * 10**9", "x = 'a'\nwhile True: x += x", "1 << 10**11"])
def test_memory_is_bounded(backend, code):
    result = run_python(code, backend=backend, memory_bytes=128 << 20)
    assert "Memory" in result.error or "Overflow" in result.error


def test_output_is_bounded(backend):
    result = run_python("while True: print('x' * 1000)", backend=backend, output_bytes=5000)
    assert len(result.stdout) <= 5000
    assert result.truncated
    assert "OutputLimit" in result.error


def test_a_large_value_is_cut(backend):
    result = run_python("'y' * 10**6", backend=backend, output_bytes=5000)
    assert len(result.value) <= 5000
    assert result.truncated


ESCAPES = {
    # The forms in which restricted interpreters were left: by attribute, by class hierarchy, by
    # native code, by dunder methods that fire in the host, by a process, by a fresh import.
    "getattr": "getattr(getattr((), '__cl' + 'ass__'), '__base__').__subclasses__()",
    "hierarchy": "[c for c in ().__class__.__base__.__subclasses__() if 'Popen' in c.__name__]"
    "[0](['touch', PATH])",
    "ctypes": "import ctypes\nctypes.CDLL(None).system(b'touch ' + PATH.encode())",
    "globals": "(lambda: 0).__globals__['__builtins__'].open(PATH, 'w')",
    "subprocess": "import subprocess\nsubprocess.run(['touch', PATH])",
    "os.system": "import os\nif os.system('touch ' + PATH): raise OSError",
    "import": "__import__('os').mknod(PATH)",
    "frame": "import sys\nsys._getframe().f_builtins['open'](PATH, 'w')",
    "parent": "import os\nos.kill(os.getppid(), 0)\nopen('/proc/1/environ').read()",
    "repr": "class A:\n    def __repr__(self): open(PATH, 'w'); return 'a'\n"
    "    __str__ = __del__ = __eq__ = __hash__ = __repr__\nA()",
    "code object": "exec(compile('open(PATH, \"w\")', 'x', 'exec'))",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_known_escapes_leave_no_trace(backend, name, tmp_path):
    target = tmp_path / "escaped"
    run_python(f"PATH = {str(target)!r}\n" + ESCAPES[name], backend=backend, timeout_seconds=3)
    assert not target.exists()


FORKS = {
    "fork": "import os\nos.fork()",
    "spawn": "import os\nos.posix_spawn('/usr/bin/true', ['true'], {})",
    "clone": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.syscall(NR, 17, 0, 0, 0, 0) < 0: raise OSError(ctypes.get_errno())",
    "pool": "import multiprocessing\nmultiprocessing.Process(target=print).start()",
}


@pytest.mark.parametrize("name", FORKS)
def test_no_process_can_be_made(bwrap, name):
    number = {"x86_64": 56, "aarch64": 220}[platform.machine()]
    result = run_python(f"NR = {number}\n" + FORKS[name], backend=bwrap)
    assert result.error


def test_threads_can_be_made_and_share_the_memory_limit(bwrap):
    code = "import threading\nt = threading.Thread(target=print, args=('hi',))\nt.start(); t.join()"
    assert run_python(code, backend=bwrap).stdout == "hi\n"
    bomb = (
        "import threading, time\n"
        "for _ in range(10000): threading.Thread(target=time.sleep, args=(60,)).start()"
    )
    assert run_python(bomb, backend=bwrap, memory_bytes=128 << 20).error


def test_host_processes_and_devices_are_not_there(bwrap):
    code = "import os\nprint(os.path.exists('/proc'), os.listdir('/dev'), os.getpid())"
    shown = run_python(code, backend=bwrap).stdout
    assert shown.startswith("False ['null'] ")
    assert int(shown.split()[-1]) < 10  # its own process namespace


def test_limits_cannot_be_raised(bwrap):
    code = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))"
    assert "Error" in run_python(code, backend=bwrap).error


def test_files_in_memory_are_bounded(bwrap):
    for code in (
        "f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))",
        "open('/elsewhere', 'w')",
        "import os\nos.memfd_create('x')",
    ):
        assert run_python(code, backend=bwrap).error


def test_the_working_directory_is_writable(bwrap):
    result = run_python("open('a.txt', 'w').write('hi')\nopen('a.txt').read()", backend=bwrap)
    assert result.value == "'hi'"


def test_numpy_is_there(bwrap):
    result = run_python("import numpy as np\nint(np.arange(5).sum())", backend=bwrap)
    assert result.value == "10", result.error


def test_a_forged_report_harms_only_its_own_result(bwrap):
    for line in (b"{}\n", b"[1]\n", b'{"value": {}, "error": 3, "cut": 0}\n', b"\xff\n"):
        code = f"import os\nfor fd in range(3, 20):\n    try: os.write(fd, {line!r})\n"
        code += "    except OSError: pass\nos._exit(7)"
        result = run_python(code, backend=bwrap)
        assert result.error
        assert result.backend == "bubblewrap"


def test_a_crash_is_named(bwrap):
    assert "Crashed" in run_python("import ctypes\nctypes.string_at(0)", backend=bwrap).error


def test_exit_handlers_and_threads_do_not_outlive_the_report(bwrap):
    code = "import atexit, time\natexit.register(time.sleep, 60)\n7"
    result = run_python(code, backend=bwrap)
    assert result.value == "7"
    assert result.seconds < 4


def test_can_be_called_from_many_threads(backend):
    results = {}

    def work(i):
        results[i] = run_python(f"{i} * 10", backend=backend, timeout_seconds=30).value

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: str(i * 10) for i in range(4)}


def test_nothing_runs_without_a_backend(monkeypatch, tmp_path):
    def never(code, limits):
        raise AssertionError("ran")

    broken = {name: Backend(lambda: "not today", never, "") for name in BACKENDS}
    monkeypatch.setattr("internjax.sandbox.BACKENDS", broken)
    with pytest.raises(Missing, match="not today"):
        run_python("1")


def test_falls_to_monty_where_bubblewrap_is_not_installed(monkeypatch):
    if BACKENDS["monty"].why_not():
        pytest.skip("monty is not installed")
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None)
    bubblewrap.why_not.cache_clear()
    try:
        assert choose_backend() == "monty"
        assert run_python("6 * 7").backend == "monty"
        with pytest.raises(Missing, match="apt install bubblewrap"):
            choose_backend("bubblewrap")
    finally:
        bubblewrap.why_not.cache_clear()


def test_a_bubblewrap_that_fails_runs_nothing(bwrap, monkeypatch):
    monkeypatch.setattr(bubblewrap, "_command", lambda fd: ["bwrap", "--no-such-option"])
    with pytest.raises(Missing, match="bwrap"):
        run_python("1", backend="bubblewrap")


@pytest.mark.parametrize(
    "wrong",
    [{"backend": "docker"}, {"timeout_seconds": 0}, {"memory_bytes": 1}, {"output_bytes": 0}],
)
def test_wrong_requests_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        run_python("1", **wrong)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_program_jumps_inside_itself(machine):
    size = struct.calcsize("=HBBI")
    program = seccomp.program(machine)
    code = [struct.unpack_from("=HBBI", program, i) for i in range(0, len(program), size)]
    assert len(program) % size == 0
    assert code[-1] == (0x06, 0, 0, 0x7FFF0000)
    for at, (operation, yes, no, _) in enumerate(code):
        if operation & 0x07 == 0x05:
            assert at + 1 + max(yes, no) < len(code)
