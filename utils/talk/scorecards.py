"""모델의 성적표를 재고, 학습 폴더의 run.json에 남기고, 페이지의 표로 만든다."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from utils import record
from utils.data.exams import is_kobest, load_exams
from utils.decode import scorecard
from utils.decode.scorecard import Score
from utils.paths import find_input
from utils.record import MODELS
from utils.talk.answerer import Answerer

HEADERS = ("시험", "문항", *(model.title for model in MODELS))


def measure(answerer: Answerer, name: str, run_dir: Path | None, has_template: bool, cache_dir: str | None,
            say: Callable[[str], None]) -> list[Score]:
    """시험들의 성적. 어댑터를 얹었으면 켠 것과 끈 것을 같은 문항으로 잰다. run.json이 있으면 거기에도 남긴다.

    Args:
        name: "kobest", KoBEST의 파일이 든 폴더, 사용자의 행이 든 파일 가운데 하나.
        has_template: 모델이 템플릿을 배웠거나 사용자가 골랐는지. 아니면 KoBEST는 글 그대로 묻는다.

    Raises:
        UsageError: 시험을 읽을 수 없다.
    """
    name = find_input(name)
    plain = not has_template and is_kobest(name)
    exams = load_exams(name, None if plain else answerer.prompter, cache_dir)
    say(f"묻는 글: {'템플릿 없이 lm-evaluation-harness의 글 그대로' if plain else f'템플릿 {answerer.prompter.name}'}")
    names = [model.name for model in MODELS if answerer.can_compare or not model.tuned]
    scores = scorecard.measure(answerer.likelihoods, names, exams, answerer.encoder, answerer.end_id,
                               answerer.context, say)
    if run_dir is not None and (run_dir / record.RUN_FILE).is_file():
        keep_scores(run_dir, scores)
        say(f"run.json에 남겼다: {run_dir / record.RUN_FILE}")
    return scores


def keep_scores(run_dir: Path, scores: Sequence[Score]) -> None:
    """run.json의 성적표에 더한다. 같은 시험의 앞선 성적은 바뀐다."""
    run = record.read_run(run_dir)
    kept = {score["name"]: score for score in _kept(run)}
    kept |= {score.name: score.as_dict() for score in scores}
    record.write_run(run_dir, {**run, "scorecard": list(kept.values())})


def table(run: dict) -> list[list[str]]:
    """run.json에 남은 성적표의 줄들(`HEADERS`의 차례). 없으면 빈 목록이다. 손으로 고쳐 읽을 수 없는 줄은 뺀다."""
    rows = []
    for make, measured in (*((_score_row, score) for score in _kept(run)), (_exact_row, run.get("exact"))):
        with contextlib.suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
            rows.append(make(measured))
    return rows


def _kept(run: dict) -> list[dict]:
    """run.json에 남은 성적들."""
    found = run.get("scorecard")
    return [score for score in found if isinstance(score, dict) and "name" in score] if isinstance(found, list) else []


def _score_row(score: dict) -> list[str]:
    shares = [f"{score['accuracy'][model.name]:.1%} ±{score['standard_error'][model.name]:.1%}"
              if model.name in score["accuracy"] else "-" for model in MODELS]
    return [" · ".join(filter(None, (score["title"], score.get("source")))), f"{score['items']:,}", *shares]


def _exact_row(exact: dict) -> list[str]:
    return ["검증 질문에 정답과 똑같이", f"{exact['rows']:,}",
            *(f"{exact[model.name] / exact['rows']:.1%}" for model in MODELS)]
