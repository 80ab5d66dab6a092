"""아무렇게나 만든 플래그, 어댑터 폴더, 모델 폴더, 체크포인트는 모두 한 줄로 거절되고 디스크는 그대로다."""

import inspect
import json
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script, refuse, run_script
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from utils import cli
from utils.errors import UsageError
from utils.merge import job, proof
from utils.model import checkpoint
from utils.model.adapter import find_adapter, read_adapter_config, read_prompt_info
from utils.model.folder import open_model_folder
from utils.train import conditions

finetune_lora = load_script("finetune-lora.py")
PARAMETERS = inspect.signature(finetune_lora.train).parameters
many = settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
several = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
some = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))

words = st.one_of(st.text(max_size=20), st.sampled_from([*PARAMETERS, *finetune_lora.RETIRED]),
                  st.integers().map(str), st.floats().map(str),
                  st.sampled_from(["", "-", "--", "---", "=", "None", "true", "[]", "['a'", "1e999", "-1", "{x}", "#"]))
tokens = st.one_of(words, words.map(lambda word: f"--{word}"), words.map(lambda word: f"-{word}"),
                   st.tuples(words, words).map(lambda pair: f"--{pair[0]}={pair[1]}"))
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner,
                                                                                       max_size=3), max_leaves=8)
DEEP = "[" * 5000


def only_usage_error(function, *arguments):
    """UsageError만 난다. 그 글은 빈 줄이 아니다."""
    try:
        return function(*arguments)
    except UsageError as error:
        assert str(error).strip()
        return error


def listing(folder: Path) -> list[tuple]:
    return sorted((str(file), file.stat().st_size) for file in folder.rglob("*"))


@many
@given(st.lists(tokens, max_size=6))
@example(["--resume_from_checkpoint", "--seed"])
def test_any_command_line_is_flags_or_one_line(argv):
    flags = only_usage_error(cli.parse, finetune_lora.train, argv, finetune_lora.RETIRED)
    if isinstance(flags, dict):
        assert set(flags) <= set(PARAMETERS)


numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), st.none())


@several
@given(st.dictionaries(st.sampled_from([n for n, p in PARAMETERS.items() if p.annotation not in (str, bool)]), numbers))
@example({"batch_size": 10**15})
def test_any_number_is_in_range_or_one_line(values):
    texts = [f"--{name}={value}" for name, value in values.items()]
    flags = only_usage_error(cli.parse, finetune_lora.train, texts, {})
    if isinstance(flags, dict):
        defaults = {name: parameter.default for name, parameter in PARAMETERS.items()}
        only_usage_error(finetune_lora.check_flags, {**defaults, **flags})


@pytest.mark.parametrize("argv, words", [
    ("--num_train_epochs 1e30", "100,000 이하"), ("--dpo_beta 1e30", "100 이하"),
    ("--cutoff_len 1000000", "131,072 이하"), ("--lora_r 99999999", "8,192 이하"), ("--lora_alpha 1e30", "1e5 이하"),
    ("--early_stopping_patience 0", "1 이상"), ("--wandb_run_name 가", "--wandb_project를 함께")])
def test_a_number_out_of_range_names_the_side_that_it_is_out_of(argv, words):
    defaults = {name: parameter.default for name, parameter in PARAMETERS.items()}
    with pytest.raises(UsageError, match=words):
        finetune_lora.check_flags({**defaults, **cli.parse(finetune_lora.train, argv.split(), {})})


def fill(folder: Path, contents: dict[str, bytes]) -> list[tuple]:
    for file in folder.iterdir():
        file.unlink()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return listing(folder)


documents = st.one_of(st.binary(max_size=40), json_values.map(lambda value: json.dumps(value).encode()),
                      st.just(DEEP.encode()))


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("room")


@some
@given(st.dictionaries(st.sampled_from(["adapter_config.json", "adapter_model.safetensors", "prompt.json",
                                        "manifest.json"]), documents))
def test_any_adapter_folder_is_an_adapter_or_one_line(room, contents):
    before = fill(room, contents)
    only_usage_error(find_adapter, room)
    only_usage_error(read_adapter_config, room)
    only_usage_error(read_prompt_info, room)
    assert checkpoint.damage(room)
    assert listing(room) == before


def header(content: bytes, length: int | None = None, tail: bytes = b"") -> bytes:
    return struct.pack("<Q", len(content) if length is None else length % 2**64) + content + tail


entries = st.fixed_dictionaries({}, optional={
    "dtype": st.sampled_from(["F16", "F32", "X", 3, None]) | json_values,
    "shape": st.lists(st.integers(-2, 2**40), max_size=3) | json_values,
    "data_offsets": st.lists(st.integers(-8, 2**40), max_size=3) | json_values})
tables = st.dictionaries(st.text(max_size=6), entries | json_values, max_size=3).map(lambda t: json.dumps(t).encode())
shards = st.one_of(st.binary(max_size=60), st.builds(header, tables | documents, st.none() | st.integers(0, 2**64 - 1),
                                                     st.binary(max_size=16)))
maps = st.dictionaries(st.text(max_size=6), st.sampled_from(["a.safetensors", "../a.safetensors", "C:a.safetensors",
                                                             "/etc/passwd", "a\\b.safetensors", "model.bin", ""])
                       | json_values, max_size=3)


@some
@given(st.dictionaries(st.sampled_from(["model.safetensors", "a.safetensors", "pytorch_model.bin"]), shards),
       documents | st.just(b'{"model_type": "gpt_neox"}'),
       st.none() | documents | maps.map(lambda names: json.dumps({"weight_map": names}).encode()))
def test_any_model_folder_is_a_model_or_one_line(room, files, config, index):
    contents = {**files, "config.json": config}
    if index is not None:
        contents["model.safetensors.index.json"] = index
    before = fill(room, contents)
    only_usage_error(open_model_folder, room)
    assert listing(room) == before


@some
@given(st.dictionaries(st.sampled_from(["seed", "num_train_epochs", "lora_r", "x"]), json_values))
def test_any_recorded_run_differs_by_name(old):
    new = {name: {"id": 1, "shown": "1"} for name in ("seed", "num_train_epochs", "lora_r")}
    assert all(": " in line for line in conditions.differences(old, new))


@pytest.fixture
def copied(tiny_neox, tmp_path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    for file in Path(tiny_neox).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def spoil(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "auto_map":
        edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    elif how in ("outside", "drive"):
        weights.unlink()  # 파일 하나가 있으면 index는 읽지 않는다
        outside = "../outside.safetensors" if how == "outside" else "C:\\outside.safetensors"
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": outside}}), encoding="utf-8")
    elif how == "header":
        with weights.open("wb") as stream:
            stream.write(struct.pack("<Q", 100_000_000))
            stream.truncate(100_000_100)
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "deep":
        (folder / "config.json").write_text(DEEP, encoding="utf-8")
    elif how == "shapes":
        edit_json(folder / "config.json", hidden_size=96, intermediate_size=384)
    elif how == "layers":
        edit_json(folder / "config.json", num_hidden_layers=3)
    elif how == "nan":
        tensors = load_file(weights)
        name = next(name for name in tensors if "query_key_value.weight" in name)
        tensors[name] = torch.full_like(tensors[name], math.nan)
        save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("how, named", [
    ("pickle", "pickle"), ("auto_map", "auto_map"), ("outside", "폴더 밖"), ("drive", "폴더 밖"),
    ("header", "100,000,000"), ("truncated", "덜 받아진 파일"), ("deep", "config.json"), ("shapes", "가중치는"),
    ("layers", "layers.2"), ("nan", "NaN"),
])
def test_hostile_base_model_is_refused_and_nothing_is_written(lab, copied, tmp_path, how, named):
    spoil(copied, how)
    refused = lab.train(tmp_path / "run", base_model=copied)
    assert refused.code == 2 and named in refused.error, refused.text
    assert not list(tmp_path.glob("run/[!.]*"))


@pytest.fixture
def adapter(tiny_run, tmp_path) -> Path:
    """manifest가 없어(다른 도구로 만든 것처럼) 모양만으로 가려야 하는 어댑터."""
    shutil.copytree(tiny_run, tmp_path / "adapter")
    (tmp_path / "adapter" / "manifest.json").unlink()
    return tmp_path / "adapter"


@pytest.mark.parametrize("changes", [None, {"peft_type": "ZZZ"}, {"r": "x"}, {"target_modules": ["x"]}])
def test_adapter_that_does_not_fit_is_one_line(adapter, changes):
    weights = adapter / "adapter_model.safetensors"
    if changes is None:
        save_file({name: tensor[:, :-1].contiguous() for name, tensor in load_file(weights).items()}, weights)
    else:
        edit_json(adapter / "adapter_config.json", **changes)
    done = run_script("generate.py", "--peft_root", str(adapter), "--ask", "1 더하기 1는?")
    assert done.returncode == 2 and done.stderr.startswith("오류: 어댑터"), done.stderr
    assert done.stderr.count("\n") == 1 and str(adapter) in done.stderr


def test_adapter_given_as_the_base_names_the_flag(adapter, capsys):
    error = refuse(capsys, load_script("generate.py").serve, "--base_model", str(adapter), "--ask", "가")
    assert "--peft_root" in error


def test_merge_is_proved_even_when_every_row_is_the_same(adapter, tmp_path):
    data = tmp_path / "same.json"
    data.write_text('{"text": "### 질문: 가\\n\\n### 답변: 나"}\n' * 8, encoding="utf-8")
    run = json.loads((adapter / "run.json").read_text(encoding="utf-8"))
    edit_json(adapter / "run.json", settings={**run["settings"], "data_path": str(data)})
    windows = proof.read_windows(job.open_job(str(adapter), None, None, "original"))
    assert windows.source == str(data) and windows.answer.any()


@pytest.mark.skipif(sys.platform != "linux", reason="쓸 수 있는 크기는 Linux에서 줄인다")
def test_merge_on_a_full_disk_is_one_line_and_leaves_nothing(tiny_run, tmp_path):
    command = 'ulimit -f 20; exec "$0" "$@"'
    words = [sys.executable, str(ROOT / "merge-lora.py"), "--peft_root", str(tiny_run), "--output_dir",
             str(tmp_path / "merged")]
    done = subprocess.run(["bash", "-c", command, *words], capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("오류: 디스크가 차서"), done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
