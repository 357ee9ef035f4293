"""`python` for `ci/gpu.sh`: its commands run in processes that are forked from the host of the TE backend.

They have a user's guards, and the CPU stands for GPUs (`tests.te.as_gpu`).
"""

import os
import runpy
import sys
import traceback
from pathlib import Path

from tests.te.host import ROOT, Worker, results


def write(file: Path) -> Path:
    """The command; it needs the environment of the tests."""
    main = f"import sys; sys.path.insert(0, '{ROOT}'); from tests.te import script; sys.exit(script.main())"
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{main}" "$@"\n')
    file.chmod(0o755)
    return file


def main() -> int:
    """Run as `python *arguments`; the exit code."""
    worker = Worker("te")
    worker.begin(_python, sys.argv[1:], str(Path.cwd()), dict(os.environ))
    return results([worker])[0]


def _python(arguments: list[str], folder: str, environment: dict[str, str]) -> int:
    import tests.te.as_gpu  # noqa: F401

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    try:
        _execute(*arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return 1 if isinstance(end.code, str) else end.code or 0
    except Exception:  # noqa: BLE001  as an interpreter
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _execute(option: str, *arguments: str) -> None:
    if option == "-m":
        sys.argv = list(arguments)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        assert option == "-", option
        exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
