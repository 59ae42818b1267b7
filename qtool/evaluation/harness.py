"""Tasks of lm_eval (EleutherAI's evaluation harness): found, run, and taken apart by sample.

lm_eval is an extra. It gets its data sets from the hub, and runs Python that task definitions name;
with those of `--task-path` only where the user has said to trust it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtool.checkpoint.untrusted import printable, shown_path
from qtool.errors import HubError, UnsupportedError, UsageError
from qtool.evaluation.continuations import TaskRunner
from qtool.evaluation.harness_model import HarnessModel
from qtool.evaluation.task_scoring import Shortened
from qtool.evaluation.task_tokens import TaskTokenizer

PACKAGE = "lm_eval"
INSTALL = "pip install 'qtool-llm[tasks]'"
# What stands for a task where it has several figures.
MAIN = ("acc", "exact_match", "em", "pass@1", "acc_norm", "f1")
FEWSHOT_SEED = 1234  # lm_eval's own
# What wrong definitions and other versions of data sets raise.
FAULTS = (
    ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError, AssertionError,
)  # fmt: skip


@dataclass(frozen=True)
class HarnessOptions:
    """How lm_eval's tasks are run.

    Args:
        names: of tasks, groups and tags.
        directory: with definitions of the user's own, None without.
        limit: most samples of each task, and of each part of a group; None for all.
        fewshot: examples in a prompt; None for what a task says.
        chat: whether prompts are laid out by the chat template.
        offline: whether only data that is on this machine may be used.
    """

    names: tuple[str, ...]
    directory: Path | None = None
    limit: int | None = None
    fewshot: int | None = None
    chat: bool = False
    offline: bool = False


@dataclass(frozen=True)
class HarnessScores:
    """What a model did in one task.

    Args:
        samples: for each metric the values of all samples, in an order that is the same for all
            models; the main metric first.
        summaries: metrics that only have one value for all samples.
        count: samples.
    """

    samples: dict[str, list[float]] = field(default_factory=dict)
    summaries: dict[str, float] = field(default_factory=dict)
    count: int = 0


def check_installed() -> None:
    """Check that lm_eval is there, without importing it.

    Raises:
        UnsupportedError: it is not.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise UnsupportedError(
            f"--tasks are run by {PACKAGE}, which is not installed",
            f"{INSTALL}; --task-file needs nothing",
        )


class Harness:
    """Tasks that are there with their data, for any number of models.

    Args:
        options: what to run.

    Raises:
        UnsupportedError: lm_eval is not installed or cannot be loaded.
        UsageError: an unknown task, or a definition that makes no sense.
        HubError: a data set cannot be reached.
    """

    def __init__(self, options: HarnessOptions) -> None:
        check_installed()
        self._options = options
        with _quiet():
            if options.offline:
                _go_offline()
            manager = _manager(options.directory)
            self._tasks: dict[str, Any] = {}
            self._members: dict[str, list[str]] = {}
            for name in options.names:
                found = _load(manager, name)
                self._members[name] = list(found)
                self._tasks.update(found)

    def run(
        self,
        runner: TaskRunner,
        tokenizer: TaskTokenizer,
        cut: Shortened,
        warn: Callable[[str, str], None],
    ) -> dict[str, HarnessScores]:
        """Run a model on all tasks; returns what it did in each.

        Raises:
            UnsupportedError: lm_eval cannot run a task, or the model not one of its texts.
            CapacityError: a task generates text, and the whole model does not fit.
        """
        import lm_eval

        options = self._options
        lm = _adapter(HarnessModel(runner, tokenizer, cut, warn))
        with _quiet():
            try:
                self._set_fewshot()
                results = lm_eval.evaluate(
                    lm=lm,
                    task_dict={"tasks": self._tasks, "groups": {}},
                    limit=options.limit,
                    bootstrap_iters=0,
                    log_samples=True,
                    apply_chat_template=options.chat,
                    fewshot_as_multiturn=options.chat,
                )
            except FAULTS as error:
                if lm.asked:
                    raise
                raise UnsupportedError(
                    f"{PACKAGE} cannot run {', '.join(self._members)}: {_said(error)}",
                    "run it with lm_eval itself to see why, or leave the task out",
                ) from error
        found = {}
        for name, leaves in self._members.items():
            scores = _scores(results, leaves)
            if scores.samples or len(leaves) == 1:
                found[name] = scores
            else:  # parts that have no metric in common stand by themselves
                found.update({leaf: _scores(results, [leaf]) for leaf in leaves})
        return found

    def _set_fewshot(self) -> None:
        """Give every task its number of examples, and the seed by which they are drawn."""
        for task in self._tasks.values():
            own = task.get_config("num_fewshot")
            # A task that says 0 of itself is one that examples would spoil.
            if own is None or (self._options.fewshot is not None and own != 0):
                task.set_config(key="num_fewshot", value=self._options.fewshot or 0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _go_offline() -> None:
    """Have `datasets` look at what is on this machine only, as HF_HUB_OFFLINE would have."""
    import datasets
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


def _manager(directory: Path | None) -> Any:
    if directory is not None and not directory.is_dir():
        raise UsageError(
            f"--task-path: {shown_path(directory)} is not a directory",
            "give the directory that holds your task definitions (.yaml)",
        )
    faults: tuple[type[Exception], ...] = (*FAULTS, OSError, *_yaml_errors())
    try:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=None if directory is None else str(directory))
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(f"{PACKAGE} cannot be loaded: {_said(error)}", INSTALL) from error
    except faults as error:
        raise UsageError(
            f"--task-path: {PACKAGE} cannot read the definitions: {_said(error)}",
            "try them with lm_eval itself",
        ) from error


def _yaml_errors() -> tuple[type[Exception], ...]:
    import yaml

    return (yaml.YAMLError,)


def _load(manager: Any, name: str) -> dict[str, Any]:
    """Return task name -> task of what one name stands for, data sets included.

    Raises:
        UsageError: there is no such task, or it cannot be made.
        HubError: its data set cannot be reached.
    """
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub import errors

    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, 3)
        raise UsageError(
            f"--tasks: {PACKAGE} has no task '{printable(name)}'",
            f"did you mean {', '.join(near)}?" if near else "lm_eval ls tasks shows all of them",
        )
    # The hub library has changed its HTTP client before; whichever it is, this is its base error.
    transport: type[Exception] = vars(errors)["HTTPError"]
    unreachable = (ConnectionError, TimeoutError, DatasetNotFoundError, transport)
    faults: tuple[type[Exception], ...] = (*FAULTS, OSError, DatasetsError, *_yaml_errors())
    try:
        return dict(manager.load([name])["tasks"])
    except unreachable as error:
        raise HubError(
            f"task {printable(name)}: its data set cannot be reached: {_said(error)}",
            "check the network, --offline and HF_HUB_OFFLINE; it is kept once it was downloaded. "
            "--task-file needs no network",
        ) from error
    except faults as error:
        offline = "offline" in type(error).__name__.lower() or "offline" in str(error).lower()
        if offline:
            raise HubError(
                f"task {printable(name)}: its data set is not on this machine, and it is offline",
                "run it once with the network, or use --task-file",
            ) from error
        raise UsageError(
            f"task {printable(name)} cannot be loaded: {_said(error)}",
            "check its definition and its data files",
        ) from error


def _adapter(model: HarnessModel) -> Any:
    """Return a model as lm_eval wants it: a subclass of its own class."""
    from lm_eval.api.model import LM

    class Adapter(LM):  # type: ignore[misc]  # lm_eval need not be there
        """Passes questions on; what goes wrong while one is open has gone wrong in qtool."""

        asked = False

        def _asked(self, question: Callable[..., Any], items: list[Any]) -> Any:
            self.asked = True
            answers = question(items)
            self.asked = False
            return answers

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return self._asked(model.loglikelihood, [r.args for r in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return self._asked(model.loglikelihood_rolling, [r.args[0] for r in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            return self._asked(model.generate_until, [r.args for r in requests])

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return model.apply_chat_template(
                chat_history, add_generation_prompt=add_generation_prompt
            )

        def chat_template(self, chat_template: bool | str = False) -> str:
            return model.template if chat_template else ""

        @property
        def tokenizer_name(self) -> str:
            return model.template_name

    return Adapter()


def _scores(results: Mapping[str, Any], leaves: Sequence[str]) -> HarnessScores:
    """Take the values of samples out of lm_eval's results, those of a group's parts together."""
    values: dict[str, list[float]] = {}
    seen = {(leaf, sample["doc_id"]) for leaf in leaves for sample in _samples(results, leaf)}
    for leaf in leaves:
        for sample in _samples(results, leaf):
            for metric in sample["metrics"]:
                number = _number(sample[metric])
                if number is not None:
                    values.setdefault(_name(metric, sample["filter"]), []).append(number)
    # A metric that some samples or some parts of a group lack has no mean over all.
    whole = {name: found for name, found in values.items() if len(found) == len(seen)}
    order = sorted(whole, key=_rank)
    summaries: dict[str, float] = {}
    if len(leaves) == 1:
        for key, value in results["results"].get(leaves[0], {}).items():
            metric, _, kind = key.partition(",")
            number = _number(value)
            name = _name(metric, kind)
            if kind and number is not None and not metric.endswith("_stderr"):
                summaries.setdefault(name, number)
    summaries = {name: value for name, value in summaries.items() if name not in whole}
    return HarnessScores({name: whole[name] for name in order}, summaries, len(seen))


def _samples(results: Mapping[str, Any], leaf: str) -> Sequence[Mapping[str, Any]]:
    return results["samples"].get(leaf, ())


def _name(metric: str, kind: str) -> str:
    return metric if kind in {"none", ""} else f"{metric},{kind}"


def _rank(name: str) -> int:
    bare = name.partition(",")[0]
    return MAIN.index(bare) if bare in MAIN else len(MAIN)


def _number(value: object) -> float | None:
    """Return a plain number; what numpy makes of one counts, too."""
    plain = getattr(value, "item", lambda: value)() if getattr(value, "ndim", 0) == 0 else None
    if not isinstance(plain, int | float):
        return None
    number = float(plain)
    return number if math.isfinite(number) else None


def _said(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return printable(words or type(error).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm_eval's bars and log off the terminal, and whatever it prints off stdout."""
    import datasets
    from tqdm import tqdm

    logger, begin = logging.getLogger(PACKAGE), tqdm.__init__
    level, shown = logger.level, datasets.is_progress_bar_enabled()

    def without_bar(bar: Any, *arguments: Any, **settings: Any) -> None:
        begin(bar, *arguments, **{**settings, "disable": True})

    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    tqdm.__init__ = without_bar
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        tqdm.__init__ = begin
        logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()
