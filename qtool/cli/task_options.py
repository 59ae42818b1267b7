"""The options of `qtool eval` about tasks, and what they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from qtool.checkpoint.locate import Checkpoint
    from qtool.evaluation.harness import HarnessOptions
    from qtool.evaluation.task_files import TaskFile
    from qtool.pipeline.evaluate_tasks import ModelTasks, TaskSuite
    from qtool.pipeline.progress import Progress

TaskFiles = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option(
        "--task-file",
        metavar="FILE.jsonl",
        help="Your own questions, one a line: prompt, choices and answer, or prompt and answer. "
        "Needs no network. Repeatable.",
    ),
]
Tasks = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--tasks",
        metavar="NAMES",
        help="Tasks of lm_eval, such as mmlu,hellaswag,arc_easy,gsm8k. Their data comes from the "
        "hub. Needs pip install 'qtool-llm[tasks]'.",
    ),
]
TaskPath = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--task-path",
        metavar="DIR",
        help="Your own definitions for --tasks, as lm_eval's --include_path. They run code, so "
        "--trust-remote-code must say that you know them.",
    ),
]
Limit = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--limit", help="Most samples of each task, and of each part of a group.", min=1),
]
Fewshot = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--num-fewshot",
        help="Examples in each prompt of --tasks.",
        min=0,
        show_default="the task's own",
    ),
]
ChatTemplate = Annotated[
    bool,
    typer.Option(
        "--apply-chat-template", help="Lay the prompts of tasks out by the chat template."
    ),
]


class TaskRequest:
    """What the options ask for; files are read, and tasks known by name.

    Args:
        files, names, directory, limit, fewshot, chat, offline, trusted: as given.

    Raises:
        UsageError: options that contradict each other, definitions that nobody vouches for, or a
            file that is no task file.
        UnsupportedError: lm_eval is asked for and not installed.
        DamagedError: a file that is not UTF-8 or not JSON.
    """

    def __init__(
        self,
        files: Sequence[Path] | None,
        names: str | None,
        directory: Path | None,
        limit: int | None,
        fewshot: int | None,
        *,
        chat: bool,
        offline: bool,
        trusted: bool,
    ) -> None:
        from qtool.evaluation.task_files import read_task_files

        if directory is not None and not trusted:
            _refuse_code(directory)
        self._options = _harness_options(
            names, directory, limit, fewshot, chat=chat, offline=offline
        )
        self._chat = chat
        self.files: tuple[TaskFile, ...] = read_task_files(files or (), limit)
        own = [file.name for file in self.files]
        others = list(self._options.names) if self._options else []
        self.names = (*own, *others)
        self._check_flags(limit, own, others)

    def _check_flags(self, limit: int | None, own: list[str], others: list[str]) -> None:
        from qtool.checkpoint.untrusted import printable
        from qtool.errors import UsageError

        twice = next((name for name in own if name in others), None)
        if twice is not None:
            raise UsageError(
                f"a file and a task of lm_eval are both called {printable(twice)}",
                "results and gates tell them by that name: rename the file",
            )
        if not self.names and (self._chat or limit is not None):
            flag = "--apply-chat-template" if self._chat else "--limit"
            raise UsageError(
                f"{flag} is about tasks, and there are none",
                "give some with --tasks or --task-file",
            )

    def suite(self) -> TaskSuite | None:
        """Return the tasks with their data; None if there are none.

        Raises:
            UsageError: an unknown task, or a definition that makes no sense.
            HubError: a data set cannot be reached.
        """
        if not self.names:
            return None
        from qtool.pipeline.evaluate_tasks import TaskSuite

        harness = None
        if self._options is not None:
            from qtool.evaluation.harness import Harness

            harness = Harness(self._options)
        return TaskSuite(self.files, harness, self._chat)


def _refuse_code(directory: Path) -> None:
    """Refuse definitions of tasks: functions that they name, their templates and metrics are code.

    Raises:
        UsageError: says how to allow it.
    """
    from qtool.checkpoint.untrusted import shown_path
    from qtool.errors import UsageError

    raise UsageError(
        f"--task-path {shown_path(directory)}: lm_eval runs the code that task definitions name, "
        "and their templates",
        "read them, and add --trust-remote-code; --task-file runs no code",
    )


def _harness_options(
    names: str | None,
    directory: Path | None,
    limit: int | None,
    fewshot: int | None,
    *,
    chat: bool,
    offline: bool,
) -> HarnessOptions | None:
    from qtool.errors import UsageError

    wanted = tuple(dict.fromkeys(n.strip() for n in (names or "").split(",") if n.strip()))
    if not wanted:
        flags: list[tuple[str, Any]] = [("--task-path", directory), ("--num-fewshot", fewshot)]
        alone = next((flag for flag, value in flags if value is not None), None)
        if names is not None or alone is not None:
            raise UsageError(
                f"{alone or '--tasks'} without the name of a task",
                "such as --tasks arc_easy,hellaswag",
            )
        return None
    from qtool.evaluation.harness import HarnessOptions, check_installed

    check_installed()
    return HarnessOptions(wanted, directory, limit, fewshot, chat, offline)


def scored(
    suite: TaskSuite | None,
    models: Sequence[Checkpoint],
    original: Checkpoint | None,
    device: torch.device,
    progress: Progress,
    dtype: str,
    cache: Path | None,
) -> list[ModelTasks]:
    """Return what every model reached; nothing where there are no tasks.

    Raises:
        QtoolError: as `evaluate_tasks`.
    """
    if suite is None:
        return []
    from qtool.cli.text_tokenizer import text_tokenizer
    from qtool.pipeline.evaluate_tasks import evaluate_tasks

    with text_tokenizer(original, models) as tokenizer:
        return evaluate_tasks(
            models, original, suite, tokenizer, device, progress, dtype=dtype, cache=cache
        )
