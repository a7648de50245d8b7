"""The ``megarl`` command: train, sft, eval, score, config, report, doctor."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from megarl import __version__
from megarl.algorithms.presets import PRESETS
from megarl.config import RunConfig
from megarl.experiment import apply_overrides, load_experiment, to_yaml
from megarl.utils.errors import RunFailure

NAMED_ERRORS = (RunFailure, ValueError, FileNotFoundError, FileExistsError, NotADirectoryError)


def _train(args: argparse.Namespace) -> int:
    from megarl.launch.run import train  # heavy: torch, megatron, ray

    return train(load_experiment(args.file, args.overrides, PRESETS))


def _sft(args: argparse.Namespace) -> int:
    from megarl.launch.run import sft

    return sft(load_experiment(args.file, args.overrides, PRESETS))


def _eval(args: argparse.Namespace) -> int:
    from megarl.launch.run import evaluate

    return evaluate(load_experiment(args.file, args.overrides, PRESETS))


def _score(args: argparse.Namespace) -> int:
    from megarl.launch.run import score

    config = apply_overrides(RunConfig(), args.overrides, PRESETS)
    return score(config, args.checkpoint, args.data, args.out, temperature=args.temperature, ban=args.ban)


def _config(args: argparse.Namespace) -> int:
    print(to_yaml(load_experiment(args.file, args.overrides, PRESETS)), end="")
    return 0


def _report(args: argparse.Namespace) -> int:
    from megarl.observability.report import write_report

    print(write_report(args.run_dir))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from megarl.launch import doctor

    return doctor.run()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="megarl", description="Reinforcement learning for multimodal models.")
    top.add_argument("--version", action="version", version=__version__)
    top.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, run, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        return sub

    def experiment(name: str, run, about: str) -> None:
        sub = command(name, run, about)
        sub.add_argument("file", metavar="FILE", help="an experiment (Python) or a run's config.yaml")
        sub.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="changes to its configuration; algorithm=NAME takes a preset",
        )

    experiment("train", _train, "Train by reinforcement learning.")
    experiment("sft", _sft, "Train on the experts' responses of the tasks.")
    experiment(
        "eval", _eval, "Evaluate the experiment's model, or the newest checkpoint of its run, on held-out prompts."
    )
    experiment("config", _config, "Print the whole configuration of an experiment.")
    sub = command("score", _score, "Log-probs of given responses under a model on Megatron-Core.")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a Hugging Face directory or a megarl checkpoint")
    sub.add_argument("data", metavar="DATA", help="JSONL: prompt, images, and response or response_ids")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="parallel.*, model.* and so on")
    sub.add_argument("--out", required=True, type=Path, help="JSONL; each row gains prompt_ids, response_ids, logprobs")
    sub.add_argument("--temperature", type=float, default=1.0, help="divides the logits (default 1)")
    sub.add_argument("--ban", action="store_true", help="leave out the tokens that a rollout may never sample")
    sub = command("report", _report, "Write the page that shows what a run did.")
    sub.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    command("doctor", _doctor, "Versions, backends in use, and what is missing.")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; what has a name is told in one line, everything else keeps its traceback."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that an experiment may import its neighbours, as with python -m
    for category in (UserWarning, FutureWarning):  # libraries' notices of what is deprecated or not installed
        warnings.filterwarnings("ignore", category=category)
    args, rest = parser().parse_known_args(argv)
    strange = [word for word in rest if word.startswith("-") or "=" not in word]
    if strange or (rest and "overrides" not in args):
        parser().error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if rest:  # overrides that follow an option
        args.overrides += rest
    try:
        return args.run(args)
    except NAMED_ERRORS as error:
        if args.traceback:
            raise
        print(f"megarl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("megarl: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
