"""Worker processes, forked off a clean process: a small server, which has imported the world and no more.

A process that trains has threads, a model and CUDA's state, and NVIDIA's EGL makes no context in what is
forked from it. So the server is a program of its own, whenever it is started: workers that are restarted in
the middle of a run are as clean as the first. Other than `multiprocessing`'s it does not import the script,
and with it torch, once more in each worker, and outlives a SIGTERM to the whole process group.

However the parent ends, the server ends too: it has PR_SET_PDEATHSIG, a socket that closes, and looks each
second whether the parent is there. Its workers have PR_SET_PDEATHSIG of the server: also one that is stopped
or stuck in a step dies.

The parent imports this file, the server runs it. Linux only; see `common/envs/vector.py`.
"""

import atexit
import contextlib
import ctypes
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

END_SIGNALS = {signal.SIGINT, signal.SIGTERM}  # the parent's business, also where the whole group gets them


# --------------------------------------------------------------------------------------------- in the parent

_lock = threading.RLock()
_server = _conn = _owner = None  # the server's process, the way to it, and the process whose it is


def start(module):
    """Has the server, which is started if need be, import `module` while this process does other things."""
    _ask((module, None))


def _ask(request, *fds):
    """Sends (module, what a worker is to do or None) and file descriptors, with what a fork would inherit."""
    global _server, _conn, _owner
    with _lock:
        if _owner != os.getpid() or _server.poll() is not None:
            _conn, theirs = Pipe()
            before = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)  # until it ignores them
            try:
                command = [sys.executable, os.path.abspath(__file__), str(theirs.fileno())]
                _server = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            _owner = os.getpid()
            # The death signal comes when the thread that started the server ends.
            _conn.send((_owner, threading.current_thread() is threading.main_thread()))
        with contextlib.suppress(OSError):  # it has died just now: the worker is found dead, and restarted
            _conn.send((sys.path, dict(os.environ), _folder(), *request, len(fds)))
            if fds:
                with socket.socket(fileno=os.dup(_conn.fileno())) as end:
                    socket.send_fds(end, [b" "], fds)


def _folder():
    try:
        return os.getcwd()
    except FileNotFoundError:  # deleted
        return "/"


@atexit.register
def stop():
    """Ends the server, and with it the workers that are left."""
    if _owner == os.getpid():
        _server.kill()
        _server.wait()


class Process:
    """A worker that calls `function(conn, *args)`, any that cloudpickle takes; what it offers is as in
    `multiprocessing.Process`. `module` is imported before, once in the server."""

    def __init__(self, module, conn, function, args):
        import cloudpickle  # gymnasium's; the server does without

        self._status, theirs = Pipe(duplex=False)
        self._pid = self._exitcode = None
        with theirs:
            _ask((module, cloudpickle.dumps((function, args))), conn.fileno(), theirs.fileno())
        self._server = _server

    def _read(self, timeout):
        """Reads what the server says next within `timeout` seconds (None: at any time), if there is more."""
        if self._exitcode is None and self._status.poll(timeout):
            try:
                name, value = self._status.recv()
            except (EOFError, OSError):
                name, value = "_exitcode", -signal.SIGKILL  # the server has died, which no worker survives
            setattr(self, name, value)
            return True
        return False

    @property
    def pid(self):
        """None while the server has not forked it."""
        if self._pid is None:
            self._read(0)
        return self._pid

    @property
    def exitcode(self):
        """None while it is alive."""
        while self._read(0):
            continue
        return self._exitcode

    def is_alive(self):
        return self.exitcode is None

    def join(self, timeout=None):
        until = time.monotonic() + timeout if timeout is not None else None
        while self._exitcode is None:
            if not self._read(max(until - time.monotonic(), 0) if until else None):
                break

    def kill(self):
        if self.is_alive() and self.pid is None:
            self._server.kill()  # it hangs in the import of the world
            with contextlib.suppress(subprocess.TimeoutExpired):  # dead: the next worker gets a new one
                self._server.wait(10)
        elif self.is_alive():
            with contextlib.suppress(ProcessLookupError):  # ended; the word of it is still on its way
                os.kill(self.pid, signal.SIGKILL)


# --------------------------------------------------------------------------------------------- in the server


def serve(fd):
    """Forks workers for the parent at the other end of the socket `fd`, and tells it their exit codes."""
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)
    conn = Connection(fd)
    parent, by_main_thread = conn.recv()
    if by_main_thread:
        _die_with(parent)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    ends = {}  # process id of a worker -> where its exit code goes
    while os.getppid() == parent:
        ready = wait([conn, woken], 1.0)
        if woken in ready:
            os.read(woken, 4096)
        for pid in list(ends):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with ends.pop(pid) as end, contextlib.suppress(OSError):
                    end.send(("_exitcode", os.waitstatus_to_exitcode(status)))
        if conn not in ready:
            continue
        try:
            sys.path[:], environ, folder, module, work, num_fds = conn.recv()
            fds = _receive(conn, num_fds)
        except (EOFError, OSError):
            break
        os.environ.clear()
        os.environ.update(environ)
        with contextlib.suppress(OSError):  # as the parent's, it may be deleted
            os.chdir(folder)
        with contextlib.suppress(BaseException):  # the worker will run into it, and tell
            getattr(importlib.import_module(module), "preload", int)()
        if not work:
            continue
        theirs, end = map(Connection, fds)
        server = os.getpid()
        with warnings.catch_warnings():  # numpy's idle threads
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            _die_with(server)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (conn, end, *ends.values()):
                other.close()
            _run(theirs, work)
        theirs.close()
        ends[pid] = end
        with contextlib.suppress(OSError):
            end.send(("_pid", pid))
    os._exit(0)


def _die_with(parent):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # which was dead before
        os._exit(1)


def _receive(conn, num_fds):
    if not num_fds:
        return []
    with socket.socket(fileno=os.dup(conn.fileno())) as end:
        _, fds, *_ = socket.recv_fds(end, 1, num_fds)
    return fds


def _run(conn, work):
    code = 1
    try:
        function, args = pickle.loads(work)  # the parent's own words, over a socket that it alone holds
        function(conn, *args)
        code = 0
    except BaseException:  # noqa: BLE001 (the process ends)
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
