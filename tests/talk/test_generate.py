"""콘솔의 답, 템플릿의 규칙, 거절, 그리고 한 번에 답 하나만 만드는 줄."""

import asyncio
import shutil
import socket
import threading
import time
import unicodedata

import conftest
import families
import pytest
import torch
from conftest import load_script, pieces_of, run_script
from tiny import add_head

from utils.decode.decoder import Decoder, Stats
from utils.decode.precision import choose_precision, require_room, weight_bytes
from utils.errors import UsageError
from utils.model import adapter, loader
from utils.model.folder import open_model_folder
from utils.model.loader import Device
from utils.model.tokenizer import end_token_id, load_tokenizer
from utils.prompter import Prompter
from utils.sampling import Sampling
from utils.talk.answerer import Answer, Answerer, describe
from utils.talk.line import WAITING, Busy
from utils.talk.page import free_port
from utils.talk.source import choose_prompter, find_source
from utils.turns import Turn

generate = load_script("generate.py")


def refuse(capsys, *flags: str) -> str:
    return conftest.refuse(capsys, generate.serve, *flags)


@pytest.mark.parametrize("flags, named", [
    (["--server_name", "0.0.0.0"], "--auth"),
    (["--share_gradio", "True"], "--auth"),
    (["--auth", "nobody"], "사용자:암호"),
    (["--load_4bit", "--load_8bit"], "하나만"),
    (["--server_port", "70000"], "server_port"),
    (["--eval", "5"], "--peft_root"),
    (["--input", "가"], "--ask"),
    (["--run_dirs", "없는 폴더,resources"], "없는 폴더, resources"),
    (["--eval", "0", "--peft_root", "x"], "1 이상"),
    (["--eval", "kobset"], "kobest"),
    (["--eval", "²"], "있는 폴더나 파일"),
    (["--eval=--5"], "있는 폴더나 파일"),
    (["--eval", "no-such-rows.jsonl"], "no-such-rows.jsonl"),
    (["--ask", "가", "--eval", "5", "--peft_root", "x"], "하나만"),
    (["--server_prot", "1"], "--server_port"),
    (["--base_model", "resources/polyglot-ko-1.3b-none"], "hf download EleutherAI/polyglot-ko-1.3b"),
    (["--peft_root", "no-such-folder"], "어댑터 폴더가 없다"),
])
def test_refusals(capsys, flags, named):
    assert named in refuse(capsys, *flags)


def test_folder_that_is_no_model(capsys, tmp_path):
    assert "config.json" in refuse(capsys, "--base_model", str(tmp_path))


def test_adapter_with_broken_weights_is_refused_before_loading(capsys, tmp_path, talk_run, tiny_neox):
    (tmp_path / "adapter_config.json").write_bytes((talk_run / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")
    assert "읽지 않는다" in refuse(capsys, "--peft_root", str(tmp_path), "--base_model", str(tiny_neox))


@pytest.fixture(scope="module")
def base(talk_run) -> str:
    return adapter.read_adapter_config(talk_run)["base_model_name_or_path"]


def test_ask_prints_one_answer_and_no_page(talk_run):
    done = run_script("generate.py", "--peft_root", str(talk_run), "--ask", "{x}가 뭐지?", "--input", "AI", "--verbose")
    assert done.returncode == 0, done.stderr
    assert "페이지:" not in done.stdout and "### 질문" not in done.stdout.split("계산:")[1]
    assert "템플릿: default" in done.stdout and "가중치: 32비트" in done.stdout and "토큰/초" in done.stdout
    assert "\ufffd" not in done.stdout and "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_4bit_and_8bit_flags_answer(tiny_neox):
    done = run_script("generate.py", "--base_model", str(tiny_neox), "--load_4bit", "True", "--ask", "안녕")
    assert done.returncode == 0 and "--load_4bit" in done.stdout, done.stderr


def test_eval_prints_the_table(talk_run):
    done = run_script("generate.py", "--peft_root", str(talk_run), "--eval", "1")
    assert done.returncode == 0, done.stderr
    for title in ("스스로 멈춤", "chrF", "한글 비율", "반복", "질문 되풀이"):
        assert title in done.stdout


class TestTemplate:
    """저장된 템플릿을 쓰고, 다른 것은 알린다."""

    def test_stored_template_is_used(self, talk_run, base, capsys):
        prompter = choose_prompter(find_source(None, str(talk_run), print), None, load_tokenizer(base), print)
        assert prompter.name == "default" and "주의" not in capsys.readouterr().out

    def test_naming_the_template_that_was_learned_is_no_warning(self, talk_run, base, capsys):
        source = find_source(None, str(talk_run), print)
        assert choose_prompter(source, "default", load_tokenizer(base), print).template["name"] == "default"
        assert "주의" not in capsys.readouterr().out

    def test_another_template_is_a_warning(self, talk_run, base, capsys):
        source = find_source(None, str(talk_run), print)
        prompter = choose_prompter(source, "instruction-output", load_tokenizer(base), print)
        assert prompter.name != "default" and "주의" in capsys.readouterr().out

    def test_another_start_of_the_text_is_a_warning(self, talk_run, base, capsys):
        """글머리의 토큰을 붙이지 않고 배운 어댑터에, 그것을 붙이는 토크나이저로 묻는다."""
        choose_prompter(find_source(None, str(talk_run), print), None, add_head(load_tokenizer(base)), print)
        assert "글머리에 붙인 토큰은 []인데 지금은 [1]이다" in capsys.readouterr().out

    def test_base_without_template_says_so(self, tiny_neox, capsys):
        source = find_source(str(tiny_neox), None, print)
        choose_prompter(source, None, load_tokenizer(tiny_neox), print)
        assert "저장된 것이 없어 기본값)" in capsys.readouterr().out
        tokenizer = load_tokenizer(tiny_neox)
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        choose_prompter(source, None, tokenizer, print)
        assert "--prompt_template chat" in capsys.readouterr().out

    def test_adapter_names_its_base(self, talk_run, base):
        assert find_source(None, str(talk_run), print).base_model == base

    def test_an_adapter_that_is_already_merged_is_refused(self, talk_run, base, tmp_path):
        merged = tmp_path / "merged"
        shutil.copytree(base, merged)
        shutil.copytree(talk_run, merged / "adapter", ignore=shutil.ignore_patterns("checkpoint-*"))
        with pytest.raises(UsageError, match="이미 이 어댑터를 합친"):
            find_source(str(merged), str(talk_run), print)


def test_taken_port_gives_the_next_free_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < free_port("127.0.0.1", port) <= port + 100


def test_foreign_address_is_refused():
    with pytest.raises(UsageError):
        free_port("no.such.name.invalid", 7860)


class Scripted:
    """정해 둔 토큰을 내놓는 Decoder의 자리. 줄의 규칙만 볼 때 쓴다."""

    context = 1024
    n_rows = 2**20
    finish_reason = "stop"
    stats = Stats()
    notice = ""

    def __init__(self, tokens=(), pause=0.0):
        self.tokens, self.pause, self.running, self.most = tokens, pause, 0, 0
        self.fail = False

    def use_adapter(self, on):
        self.tuned = on

    def stream(self, input_ids, settings, stop):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.fail:
                raise RuntimeError("\x1b[31m망가졌다")
            for token in self.tokens:
                if stop.is_set():
                    self.finish_reason = "cancelled"
                    return
                time.sleep(self.pause)
                yield token
            self.finish_reason = "stop"
        finally:
            self.running -= 1


@pytest.fixture
def make_answerer(tiny_neox):
    tokenizer = load_tokenizer(tiny_neox)

    def make(decoder, say=print):
        return Answerer(decoder, tokenizer, Prompter(), 2, say)

    make.tokenizer = tokenizer
    return make


def finish(answerer, *answers) -> None:
    async def follow():
        async for _ in answerer.follow(*answers):
            pass

    asyncio.run(follow())


@pytest.mark.parametrize("text", ["변호사", "문장의 끝은 next", "### 1. 개요\n본문\n### 답변: 둘째", "昔々あるところに",
                                  "ไม่มีช่องว่าง", "가\u200b나👨‍👩‍👧‍👦다", "  안쪽  공백  ",
                                  "```python\nx = {'a': 1}\n```"])
def test_whole_answers_arrive_syllable_by_syllable(make_answerer, text):
    tokens = make_answerer.tokenizer(" " + text, add_special_tokens=False)["input_ids"]
    answerer = make_answerer(Scripted(tokens))
    answer = Answer([5], Sampling())
    pieces = list(answerer.pieces(answer))
    assert "".join(pieces) == answer.text == text.lstrip()
    assert "\ufffd" not in answer.text and answer.ids == tokens


def test_one_generation_at_a_time_and_a_bounded_line(make_answerer):
    decoder = Scripted([300] * 5, pause=0.01)
    answerer = make_answerer(decoder)
    answers = [Answer([5], Sampling()) for _ in range(WAITING + 1)]
    for answer in answers:
        answerer.submit(answer)
    with pytest.raises(Busy, match="바쁘다"):
        answerer.submit(Answer([5], Sampling()))
    assert "차례를 기다리는 중" in describe(answers[-1], answerer.ahead(answers[-1]))
    finish(answerer, *answers)
    assert decoder.most == 1 and all(answer.finish_reason == "stop" for answer in answers)
    time.sleep(0.05)
    answerer.submit(Answer([5], Sampling()))


def test_stop_ends_within_one_token(make_answerer):
    decoder = Scripted([300] * 1000, pause=0.02)
    answerer = make_answerer(decoder)
    answer = Answer([5], Sampling(), session="me")
    answerer.submit(answer)
    while len(answer.ids) < 3:
        time.sleep(0.005)
    seen = len(answer.ids)
    answerer.leave("someone else")
    assert not answer.stop.is_set()
    answerer.leave("me")
    finish(answerer, answer)
    assert answer.finish_reason == "cancelled" and len(answer.ids) <= seen + 1


def test_leaving_the_line_stops_the_answer(make_answerer):
    answerer = make_answerer(Scripted([300] * 1000, pause=0.02))
    answer = Answer([5], Sampling())
    answerer.submit(answer)

    async def leave_early():
        follow = answerer.follow(answer)
        await anext(follow)
        await follow.aclose()

    asyncio.run(leave_early())
    assert answer.stop.is_set()


def test_worker_exception_ends_only_that_answer(make_answerer):
    decoder, said = Scripted([300]), []
    answerer = make_answerer(decoder, said.append)
    decoder.fail = True
    broken = Answer([5], Sampling())
    answerer.submit(broken)
    finish(answerer, broken)
    decoder.fail = False
    fine = Answer([5], Sampling())
    answerer.submit(fine)
    finish(answerer, fine)
    assert broken.finish_reason == "error" and "오류" in describe(broken) and "망가졌다" not in broken.error
    assert fine.finish_reason == "stop" and "RuntimeError" in said[0]


def test_too_long_and_empty_questions_are_refused_before_the_line(make_answerer):
    answerer = make_answerer(Scripted())
    with pytest.raises(UsageError, match="너무 길다"):
        answerer.ask("가나다 " * 3000)
    with pytest.raises(UsageError, match="비어"):
        answerer.ask("  \n")
    for texts in (("a\udcffb",), ("가?", "\ud800")):  # UTF-8이 아닌 콘솔에서 적은 글
        with pytest.raises(UsageError, match="surrogate"):
            answerer.ask(*texts)


def test_placeholder_is_filled_letter_by_letter(make_answerer):
    answerer = make_answerer(Scripted())
    for word in ("AI", "\\1{y}\\", "{x}"):
        text = make_answerer.tokenizer.decode(answerer.ask("{x}가 뭐지?", word))
        assert text == f"### 질문: {word}가 뭐지?\n\n### 답변:"


def test_a_decomposed_question_is_the_composed_one(make_answerer):
    """macOS는 풀어쓴 한글(NFD)을 붙여 넣기도 한다. 데이터에서 모아쓰듯 질문에서도 모아쓴다."""
    answerer, texts = make_answerer(Scripted()), ("{x}가 뭐지?", "인공지능")
    assert answerer.ask(*(unicodedata.normalize("NFD", text) for text in texts)) == answerer.ask(*texts)


def test_input_without_a_placeholder_is_not_lost(make_answerer):
    assert "맥락" in make_answerer.tokenizer.decode(make_answerer(Scripted()).ask("요약해 줘", "맥락"))


def test_question_tokens_are_the_training_tokens(make_answerer):
    answerer = make_answerer(Scripted())
    pieces = pieces_of(Prompter(), "왜?", "", "그래서.")
    whole = answerer.encoder.encode_batch([[pieces]])[0][0]
    asked = answerer.ask("왜?")
    assert whole[: len(asked)] == asked
    talk = [Turn("user", "왜?"), Turn("assistant", "그래서."), Turn("user", "또?")]
    assert answerer.ask_talk(talk)[: len(whole)] == whole


def test_answer_ends_at_the_tokenizers_end_token(tiny_neox):
    """config는 eos를 0이라 하지만 2에서 멈춘다. 가중치를 고쳐 2를 늘 가장 그럴듯하게 만든다."""
    model = loader.load_base(tiny_neox, loader.choose_device())
    tokenizer = load_tokenizer(tiny_neox)
    assert model.config.eos_token_id == 0
    end_id = end_token_id(tokenizer)
    model.get_output_embeddings().weight.data.zero_()
    decoder = Decoder(model, tokenizer, (end_id,))
    answerer = Answerer(decoder, tokenizer, Prompter(), end_id, print)
    never = Answer(answerer.ask("질문"), Sampling(temperature=0, max_new_tokens=5))
    assert list(answerer.pieces(never)) == [] and never.finish_reason == "length"
    model.base_model.final_layer_norm.bias.data.fill_(1)
    model.get_output_embeddings().weight.data[end_id] = 1
    stops = Answer(answerer.ask("질문"), Sampling(temperature=0, max_new_tokens=5))
    assert list(answerer.pieces(stops)) == [] and stops.finish_reason == "stop" and stops.ids == []


def test_many_threads_may_ask_at_once(make_answerer):
    answerer, wrong = make_answerer(Scripted()), []

    def ask(number):
        for _ in range(50):
            if make_answerer.tokenizer.decode(answerer.ask(f"{number}번")) != f"### 질문: {number}번\n\n### 답변:":
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_a_flag_the_fastest_precision_is_chosen(tiny_neox):
    gpu = Device(torch.device("cuda"), torch.bfloat16, "테스트")
    cpu = Device(torch.device("cpu"), torch.float32, "테스트")
    assert choose_precision(str(tiny_neox), gpu, None, False).quantize == "4bit"
    assert choose_precision(str(tiny_neox), cpu, None, False).quantize is None
    assert choose_precision(str(tiny_neox), cpu, True, False).quantize == "4bit"


@pytest.mark.parametrize("kind", ["gpt_neox", "qwen3"])
def test_weights_take_what_is_said_before_loading(kind, tmp_path):
    """VRAM에 들어가는지는 올리기 전에 본다. 작은 모델에서는 norm과 bias의 몫이 커서 8%까지 다르다."""
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3}
    families.build(kind, torch.bfloat16, **wide).save_pretrained(tmp_path)
    cpu = Device(torch.device("cpu"), torch.bfloat16, "테스트")
    for quantize in ("4bit", None):
        model = loader.load_base(tmp_path, cpu, quantize)
        held = 0
        for parameter in model.parameters():
            state = getattr(parameter, "quant_state", None)
            held += parameter.nbytes + (state.absmax.nbytes + state.state2.absmax.nbytes if state else 0)
        assert weight_bytes(open_model_folder(tmp_path), quantize) == pytest.approx(held, rel=0.08)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tiny_neox):
    require_room(str(tiny_neox), "4bit", 0.4e9)
    with pytest.raises(UsageError, match="4비트로 줄여도 VRAM이 0.3 GB 드는데 0.2 GB만"):
        require_room(str(tiny_neox), "4bit", 0.2e9)
    with pytest.raises(UsageError, match="--load_4bit True를 적거나"):
        require_room(str(tiny_neox), None, 0.2e9)
