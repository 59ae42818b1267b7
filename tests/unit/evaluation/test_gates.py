"""Gates: what may be written, what it means, and what a failed one says."""

import pytest

from qtool.errors import UsageError
from qtool.evaluation.gates import (
    MEASURES,
    check_gates,
    check_measurable,
    gate_error,
    gate_json,
    needed_metrics,
    parse_gate,
    parse_gates,
    shown_outcome,
)

RESULT = {
    "model": "./small",
    "bytes": 4_900_000_000,
    "metrics": {
        "ppl": {"value": 7.5, "se": 0.2, "tokens": 9, "ratio": 1.04, "ratio_se": 0.003},
        "kld": {
            "mean": 0.05,
            "se": 0.002,
            "median": 0.02,
            "median_se": 0.001,
            "p99": 0.4,
            "p99_se": 0.02,
            "p999": 1.5,
            "p999_se": 0.3,
            "tokens": 9,
        },
        "top1": {"value": 0.91, "se": 0.004, "tokens": 9},
        "flips": {"value": 0.06, "se": 0.002, "tokens": 9},
        "tasks": {
            "arc.v1": {
                "metric": "acc",
                "samples": 50,
                "value": 0.6,
                "se": 0.07,
                "reference": 0.62,
                "difference": -0.02,
                "difference_se": 0.014,
                "other": {"acc_norm": {"value": 0.7, "se": 0.06}},
            }
        },
    },
    "tokenizer": {"same": True, "template": "different", "differences": ["it"]},
}


def outcome(text, result=RESULT):
    return check_gates([parse_gate(text)], [result])[0]


@pytest.mark.parametrize(
    ("text", "passed", "value", "error"),
    [
        ("kld<=0.05", True, 0.05, 0.002),
        ("kld<0.05", False, 0.05, 0.002),
        (" KLD  <= 5e-2 ", True, 0.05, 0.002),
        ("kld_median<=.02", True, 0.02, 0.001),
        ("kld_p99<=0.3", False, 0.4, 0.02),
        ("kld_p999<2", True, 1.5, 0.3),
        ("ppl<=7.4", False, 7.5, 0.2),
        ("ppl_ratio<=1.05", True, 1.04, 0.003),
        ("top1>=0.9", True, 0.91, 0.004),
        ("top1>=92%", False, 0.91, 0.004),
        ("flips<6.1 %", True, 0.06, 0.002),
        ("size<=5GB", True, 4.9e9, None),
        ("size<=4.9GB", True, 4.9e9, None),
        ("size<4.5GiB", False, 4.9e9, None),
        ("size<4.6GiB", True, 4.9e9, None),
        ("tokenizer==same", True, "same", None),
        ("template == same", False, "different", None),
    ],
)
def test_a_gate_holds_or_does_not(text, passed, value, error):
    found = outcome(text)
    assert found.passed is passed
    assert found.value == pytest.approx(value) if isinstance(value, float) else found.value == value
    assert found.error == error


def test_loss_is_the_rise_of_perplexity():
    found = outcome("loss<=3%")
    assert not found.passed
    assert found.value == pytest.approx(0.04)
    assert found.error == 0.003
    assert outcome("loss<=0.041").passed
    assert "is 4 % ± 0.3 %" in shown_outcome(found)


def test_every_measure_finds_its_value_and_error():
    for name, measure in MEASURES.items():
        limit = {"number": "<1", "size": "<1GB", "same": "==same"}[measure.kind]
        found = outcome(f"{name}{':arc.v1' if measure.of_task else ''}{limit}")
        assert found.value is not None
        assert (found.error is not None) == bool(measure.error_path or measure.of_task)


@pytest.mark.parametrize(
    ("text", "passed", "value", "error"),
    [
        ("task:arc.v1>=60%", True, 0.6, 0.07),
        ("TASK:arc.v1.acc>0.6", False, 0.6, 0.07),
        ("task : arc.v1>=0.6", None, None, None),
        ("task:arc.v1.acc_norm>=0.7", True, 0.7, 0.06),
        ("task_drop:arc.v1<=2%", True, 0.02, 0.014),
        ("task_drop:arc.v1<=1%", False, 0.02, 0.014),
        ("task_drop:arc.v1.acc_norm<=1%", False, None, None),  # has no pair
        ("task:arc.v1.f1>=0", False, None, None),
    ],
)
def test_a_gate_on_a_task(text, passed, value, error):
    if passed is None:
        with pytest.raises(UsageError, match="is not a gate"):
            parse_gate(text)
        return
    found = outcome(text)
    assert (found.passed, found.error) == (passed, error)
    assert found.value == (value if value is None else pytest.approx(value))


def test_a_gate_names_the_task_that_it_looked_at():
    shown = shown_outcome(outcome("task_drop:arc.v1<=1%"))
    assert "failed: task_drop arc.v1 of ./small is 2 % ± 1.4 %" in shown


@pytest.mark.parametrize("text", ["task>=0.5", "task_drop<=1%", "kld:arc<=1", "task:a b>=1"])
def test_tasks_and_nothing_else_are_named_behind_a_colon(text):
    with pytest.raises(UsageError):
        parse_gate(text)


def test_a_gate_on_a_task_that_is_not_run_is_refused_before_the_run():
    gates = parse_gates(["task:arc.v1.acc>=0.5", "task_drop:arc.v1<=1%"])
    check_measurable(gates, has_reference=True, tasks=["arc.v1"])
    with pytest.raises(UsageError, match=r"no task 'arc.v1"):
        check_measurable(gates, has_reference=True, tasks=["arc"])
    with pytest.raises(UsageError) as caught:
        check_measurable(gates, has_reference=True)
    assert "--task-file" in caught.value.hint
    with pytest.raises(UsageError, match="compares with an original"):
        check_measurable(gates, has_reference=False, tasks=["arc.v1"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "kld",
        "kld<=",
        "<=0.05",
        "kld=0.05",
        "kld==0.05",
        "kld!=0.05",
        "kld<=low",
        "kld<=nan",
        "kld<=inf",
        "kld<=1e999",
        "kld<=0.05GB",
        "divergence<=0.05",
        "size<=big",
        "size<=0",
        "size==5GB",
        "template<=same",
        "template==other",
        "tokenizer==",
        "kld<=0.05 top1>=0.9",
    ],
)
def test_what_is_no_gate_is_refused_with_examples(text):
    with pytest.raises(UsageError) as caught:
        parse_gate(text)
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_an_unknown_name_is_told_what_there_is():
    with pytest.raises(UsageError, match="no figure 'kl'") as caught:
        parse_gate("kl<=0.05")
    assert "kld_p999" in caught.value.hint


def test_a_value_that_is_not_there_fails():
    bare = {"model": "m", "bytes": 1, "metrics": {"ppl": {"value": 2.0, "se": None, "tokens": 1}}}
    for text in ("kld<=9", "loss<=900%", "tokenizer==same", "template==same"):
        found = outcome(text, bare)
        assert (found.value, found.passed) == (None, False)
        assert "no value" in shown_outcome(found)
    assert outcome("ppl<=3", bare).error is None
    broken = {**bare, "metrics": {"kld": {"mean": float("nan")}}}
    assert not outcome("kld<=9", broken).passed


def test_what_failed_is_named_with_value_and_error():
    gates = parse_gates(["kld<=0.01", "top1>=0.9", "size<=1GB"])
    outcomes = check_gates(gates, [RESULT, {**RESULT, "model": "./other", "bytes": 5}])
    error = gate_error(outcomes)
    assert error.exit_code == 3
    assert "kld of ./small is 0.05 ± 0.002" in error.message
    assert "size of ./small is 4.9 GB" in error.message
    assert "kld of ./other" in error.message
    assert "size of ./other" not in error.message
    assert "top1" not in error.message
    assert gate_error(outcomes[1:2]) is None
    assert gate_json(outcomes[0]) == {
        "expression": "kld<=0.01",
        "model": "./small",
        "value": 0.05,
        "se": 0.002,
        "pass": False,
    }


def test_gates_say_what_must_be_measured():
    gates = parse_gates(["flips<=0.1", "loss<=3%", "size<=5GB", "template==same"])
    assert needed_metrics(gates) == {"flips", "ppl"}
    check_measurable(parse_gates(["ppl<=9", "size<=1GB"]), has_reference=False)
    for gate in gates:
        if gate.name != "size":
            with pytest.raises(UsageError, match="compares with an original"):
                check_measurable([gate], has_reference=False)
    check_measurable(gates, has_reference=True)
    assert parse_gates(None) == ()
