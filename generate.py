"""학습하거나 병합한 모델과 웹 페이지나 콘솔에서 대화한다."""

from urllib.parse import urlsplit

from utils import cli, console, process
from utils.paths import find_input, shown


def serve(
    *,
    # 모델
    base_model: str | None = None,
    peft_root: tuple[str, ...] = (),
    cache_dir: str | None = None,
    load_4bit: bool | None = None,
    load_8bit: bool = False,
    prompt_template: str | None = None,
    # 페이지
    server_name: str = "127.0.0.1",
    server_port: int = 7860,
    share_gradio: bool = False,
    auth: str | None = None,
    api: bool = False,
    run_dirs: tuple[str, ...] = (),
    # 콘솔
    ask: str | None = None,
    input: str = "",
    eval: str | None = None,
    verbose: bool = False,
):
    """웹 페이지를 연다. --ask나 --eval을 적으면 페이지 없이 콘솔에 답하고 끝낸다.

    Args:
        base_model: 모델 폴더나 hub id. 적지 않으면 어댑터를 배운 모델, 어댑터도 없으면 함께 든 데모 모델이다.
        peft_root: finetune-lora.py의 output_dir. 적지 않으면 base_model만 쓴다. 쉼표로 여럿을 이으면 기반 모델을 한 번
            올리고 어댑터를 모두 얹어, 페이지와 api에서 폴더의 이름으로 고른다.
        cache_dir: 받은 모델을 둘 폴더.
        load_4bit: 가중치를 4비트(NF4)로 올린다. 둘 다 적지 않으면 메모리에 들어가는 가장 빠른 것을 고른다.
        load_8bit: 가중치를 8비트로 올린다.
        prompt_template: 쓸 템플릿. 적지 않으면 어댑터나 모델에 저장된 것을 쓴다.
        server_name: 페이지를 열 주소. 127.0.0.1은 이 컴퓨터에서만, 0.0.0.0은 다른 컴퓨터에서도 들어온다(auth 필요).
        server_port: 페이지를 열 포트. 이미 쓰이고 있으면 다음 빈 포트를 쓴다.
        share_gradio: 인터넷에서 들어올 수 있는 임시 링크를 만든다(auth 필요).
        auth: 들어올 때 물을 사용자:암호. api에서는 이것이 api_key다.
        api: OpenAI 형식의 /v1/chat/completions와 /v1/completions도 연다. 요청의 model은 어댑터 폴더의 이름이나 base다.
        run_dirs: 학습 기록 탭에서 겹쳐 볼 학습 폴더들. 쉼표로 잇는다.
        ask: 콘솔에서 물을 질문 하나.
        input: ask의 {x} 자리에 넣을 글.
        eval: 수를 적으면 검증 질문을 이만큼 골라 기반 모델과 학습한 모델의 답을 잰다(peft_root가 있어야 한다). kobest나
            KoBEST의 파일이 든 폴더, 또는 내 행의 파일(options 열이 있으면 고르기)을 적으면 맞힌 비율을 잰다.
        verbose: 어떤 계산 방법을 골랐는지처럼, 이 도구를 고치는 사람에게 쓸모 있는 것도 말한다.

    Examples:
        python generate.py --peft_root train/faq
        python generate.py --peft_root train/faq --ask "배송은 며칠 걸리나요?"
    """
    flags = dict(locals())
    console.show_details(verbose)
    check_flags(flags)

    with process.importing():
        from utils.talk.source import find_sources, load_models

    sources = find_sources(base_model, peft_root, console.say, cache_dir)
    models = load_models(sources, cache_dir, load_4bit, load_8bit, prompt_template, console.say)
    if ask is not None:
        print_answers(models, ask, input)
    elif eval is not None and eval.isdecimal():
        print_scores(models.default.answerer, find_results(sources, (), models, cache_dir), int(eval))
    elif eval is not None:
        print_scorecard(models.default.answerer, sources[0], eval, prompt_template, cache_dir)
    else:
        from utils.talk.page import Access

        results = find_results(sources, run_dirs, models, cache_dir)
        title = ", ".join([sources[0].title, *(source.name for source in sources[1:])])
        open_page(models, title, results, Access(server_name, server_port, share_gradio, auth, api))


def check_flags(flags: dict) -> None:
    """모델을 올리기 전에 값을 모두 본다."""
    from pathlib import Path

    from utils.data.kobest import is_on_hub
    from utils.record import RUN_FILE
    from utils.talk.exposure import address_problem, exposure_problem

    ask, exam, peft_root = flags["ask"], flags["eval"], flags["peft_root"]
    counted = exam is not None and exam.removeprefix("-").isdecimal()
    known = exam is None or counted or is_on_hub(exam) or Path(find_input(exam)).exists()
    problem = exposure_problem(flags["server_name"], flags["share_gradio"], flags["auth"])
    nowhere = "" if ask is not None or exam is not None else address_problem(flags["server_name"])
    blank = [folder for folder in flags["run_dirs"] if not (Path(find_input(folder)) / RUN_FILE).is_file()]
    cli.check(
        [
            (not problem, problem),
            (bool(problem) or not nowhere, nowhere),
            (1 <= flags["server_port"] <= 65535, f"server_port는 1에서 65535까지다: {flags['server_port']}"),
            (not (flags["load_4bit"] and flags["load_8bit"]), "--load_4bit와 --load_8bit 가운데 하나만 쓴다"),
            (ask is None or exam is None, "--ask와 --eval 가운데 하나만 쓴다"),
            (ask is not None or not flags["input"], "--input은 --ask의 질문에 딸린 글이다. --ask를 함께 적는다"),
            (not counted or int(exam) >= 1, f"eval의 질문 수는 1 이상이다: {exam}"),
            (not counted or bool(peft_root), "--eval 수에는 학습한 폴더가 있어야 한다. --peft_root를 적는다"),
            (exam is None or len(peft_root) < 2, "--eval은 어댑터를 하나씩 잰다. --peft_root를 하나만 적는다"),
            (known, f"eval은 질문의 수, kobest, 있는 폴더나 파일 가운데 하나다: {exam}"),
            (not blank, f"run_dirs에 {RUN_FILE}이 없다: {', '.join(blank)}. finetune-lora.py의 output_dir를 적는다"),
        ]
    )


def find_results(sources, run_dirs: tuple[str, ...], models, cache_dir: str | None):
    """페이지에서 보여 줄 학습들과, 첫 어댑터의 검증 질문."""
    from pathlib import Path

    from utils import record
    from utils.talk import scores
    from utils.talk.page_learned import Results

    folders = [Path(find_input(folder)) for folder in run_dirs]
    own = [source.run_dir for source in sources if source.run_dir and (source.run_dir / record.RUN_FILE).is_file()]
    folders = [*own, *(folder for folder in folders if folder not in own)]
    runs = {shown(folder): record.read_run(folder) for folder in folders}
    first, answerer = sources[0].run_dir, models.default.answerer
    can_learn = first in own
    return Results(runs, (lambda: scores.load_validation(first, answerer, cache_dir)) if can_learn else None)


def print_answers(models, ask: str, input: str) -> None:
    """질문 하나에 콘솔에서 답한다. 어댑터가 여럿이면 차례로 답한다."""
    from utils.sampling import Sampling
    from utils.talk.answerer import Answer, describe

    for choice in models.tuned:
        answer = Answer(choice.answerer.ask(ask, input), Sampling())
        console.say(f"\n[{choice.name}]" if len(models.tuned) > 1 else "")
        for piece in choice.answerer.pieces(answer):
            print(console.printable(piece), end="", flush=True)
        console.say(f"\n\n[{describe(answer)}]")


def print_scores(answerer, results, n: int) -> None:
    """검증 질문 n개로 기반 모델과 학습한 모델을 재어 표로 보여 준다."""
    from utils.errors import UsageError
    from utils.record import MODELS
    from utils.talk import scores

    if results.load is None:
        raise UsageError("어댑터에 run.json이 없어 검증 질문을 알 수 없다. finetune-lora.py의 --output_dir를 적는다")
    validation = results.validation()
    if validation.changed:
        console.say("주의: 데이터나 나누는 법이 학습한 뒤에 바뀌었다. 학습에 쓴 질문이 섞여 있을 수 있다")
    questions = validation.questions[:n]
    rows = []
    for row in scores.evaluate(answerer, questions):
        rows.append(row)
        console.say(f"[{len(rows)}/{len(questions)}] {console.one_line(row.question, 60)}")
        for model in MODELS:
            console.say(f"  {model.title}: {console.one_line(row.answers[model.name].text, 100)}")
    console.say(f"\n검증 질문 {len(rows)}개의 평균 (↑는 클수록, ↓는 작을수록 좋다)")
    for title, base, tuned, change in scores.table(rows):
        console.say(f"  {title}: 기반 모델 {base}, 학습한 모델 {tuned} ({change})")


def print_scorecard(answerer, source, name: str, prompt_template: str | None, cache_dir: str | None) -> None:
    """시험마다 기반 모델과 학습한 모델이 맞힌 비율을 한 줄씩 보여 준다."""
    from utils.talk import scorecards
    from utils.talk.source import find_prompt_info

    has_template = prompt_template is not None or find_prompt_info(source) is not None
    scorecards.measure(answerer, name, source.run_dir, has_template, cache_dir, console.say)


def open_page(models, title: str, results, access) -> None:
    """페이지를 열고, Ctrl+C를 누를 때까지 답한다."""
    from utils.talk import page
    from utils.talk.opened import wait_for_signal
    from utils.talk.runs import Runs

    blocks = page.build(models, title, results, Runs() if access.is_private else None)
    opened = page.launch(blocks, models, access)
    port = urlsplit(opened.local).port
    if port != access.server_port:
        console.say(f"다른 프로그램이 포트 {access.server_port}번을 쓰고 있어 {port}번에 연다")
    console.say(f"\n페이지: {opened.local}  (끝내려면 Ctrl+C)")
    if opened.shared:
        console.say(f"공유 링크: {opened.shared}")
    if access.api:
        console.say(f"API: {opened.local.rstrip('/')}/v1")
    try:
        wait_for_signal()
    except KeyboardInterrupt:
        console.say("\n페이지를 닫는다")
        blocks.close(verbose=False)


if __name__ == "__main__":
    cli.run(serve)
