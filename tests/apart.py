"""Tests in a process of their own: a crash or a hang there is a failure, not the end of the suite."""

from __future__ import annotations

import faulthandler
import functools
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SECONDS = 120  # on a busy machine


def died(status: int) -> str | None:
    """What the status of a child says, None where it went well."""
    if os.WIFSIGNALED(status):
        return f"the process died of {signal.Signals(os.WTERMSIG(status)).name}"
    return None if os.WEXITSTATUS(status) == 0 else f"exit status {os.WEXITSTATUS(status)}"


def in_child(run: Callable[[], Any], seconds: int = 20) -> tuple[str | None, str]:
    """Run in a fork of this process: what it died of, if so, and its traceback."""
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read)
            faulthandler.enable(write)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)  # a hang becomes a failure
            sys.setprofile(None)
            sys.settrace(None)
            if "torch" in sys.modules:  # the pools of torch and its math library did not survive the fork
                sys.modules["torch"].set_num_threads(1)
            run()
            status = 0
        except BaseException:
            os.write(write, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    return died(os.waitpid(pid, 0)[1]), text


def apart(test: Callable[..., None], seconds: int = 20) -> Callable[..., None]:
    """A test whose body runs in a fork of this process, where torch has one thread; where there is no fork, here."""
    if not hasattr(os, "fork"):
        return test

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        found, text = in_child(lambda: test(*args, **kwargs), seconds)
        if found:
            pytest.fail(f"{found}\n{text}", pytrace=False)

    return pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")(run)


def alone(function: Callable[..., None], *arguments: str) -> str:
    """Run a function of a test module in a new interpreter, with strings as arguments: what it prints."""
    code = f"import sys, {function.__module__} as m; m.{function.__name__}(*sys.argv[1:])"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-X", "faulthandler", "-c", code, *arguments]
    seconds = SECONDS + int(os.environ.get("PYOPT_SIGNALS", "0"))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=seconds, check=False
    )
    if done.returncode:
        pytest.fail(f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}", pytrace=False)
    return done.stdout
