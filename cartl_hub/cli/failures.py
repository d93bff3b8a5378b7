"""Messages for a command that ends early."""

import shlex
import sysconfig
import traceback
from pathlib import Path

INTERRUPTED = 130  # typer's exit code after Ctrl-C
_PACKAGE = Path(__file__).parents[1].resolve()


def interrupted(arguments: list[str]) -> str:
    """Message on what was kept, and the command that resumes."""
    command, again = (arguments or [""])[0], shlex.join(["cartl-hub", *arguments])
    if command == "evaluate":
        if any(argument.partition("=")[0] == "--resume" for argument in arguments):
            return f"Interrupted. Finished batches were kept; this resumes after them: {again}"
        return f"Interrupted. Nothing was kept; with this, finished batches are: {again} --resume FOLDER"
    if command in ("finetune", "pretrain"):
        return f"Interrupted. The training's last checkpoint was kept, if it has reached one; this goes on: {again}"
    return "Interrupted."


def place(error: BaseException) -> str:
    """Place in somebody else's code where an error, or its cause, arose, such as a model of module:function; nothing if it is
    ours."""
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename).resolve()
        if path.is_relative_to(_PACKAGE):
            break
        if path.is_file() and not any(path.is_relative_to(folder) for folder in installed):
            return f" in {path}, line {frame.lineno} ({frame.name}), {type(error).__name__}"
    return "" if error.__cause__ is None else place(error.__cause__)
