"""The `numlstm` command: one module a group of subcommands, the library imported only when one runs.

What went wrong in a person's input is one line on stderr and exit code 2 (with `--json` also an object with
"error" on stdout); anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import typer

from numlstm.cli import convert, estimators, forecast, inspect, text, tools, warmup

__all__ = ["app", "main"]

app: typer.Typer = typer.Typer(
    name="numlstm",
    help="Recurrent networks on text and tables: train, evaluate and use them.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train: typer.Typer = typer.Typer(help="Train a model on a file of yours.", rich_markup_mode=None)
train.command("text")(text.train_text)
train.command("forecast")(forecast.train_forecast)
train.command("classify")(estimators.train_classify)
train.command("detect")(estimators.train_detect)

app.command("demo")(text.demo)
app.add_typer(train, name="train")
app.command("evaluate")(tools.evaluate)
app.command("predict")(tools.predict)
app.command("generate")(text.generate)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("info")(tools.info)
app.command("warmup")(warmup.warmup)
app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(tools.bench)

# The base of every usage error; typer carries it under different module names from version to version.
_UsageProblem = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (sys.argv's by default) and exit: 0 done, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = app(args=arguments, prog_name="numlstm", standalone_mode=False)
    except _UsageProblem as error:
        _refuse(error.format_message(), arguments)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        if os.environ.get("NUMLSTM_TRACEBACK"):  # for whoever looks for a bug
            raise
        _refuse(str(error), arguments)
    except (KeyboardInterrupt, typer.Abort):
        print("numlstm: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(message: str, arguments: Sequence[str]) -> None:
    line = " ".join(message.split())
    if "--json" in arguments:
        print(json.dumps({"error": line}))
    print(f"numlstm: error: {line}", file=sys.stderr)
    sys.exit(2)
