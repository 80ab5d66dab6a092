"""hub에 닿지 못하는 이유마다, 어느 길로 들어와도 어느 이름인지와 왜인지와 할 일을 한 줄로 말한다.

거절하는 hub는 이 컴퓨터에 띄운 진짜 서버다. 라이브러리가 스스로 오류를 만든다.
"""

import errno
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, load_answerer, load_script, refuse, run_script
from datasets.exceptions import DataFilesNotFoundError

from utils import hub
from utils.errors import UsageError
from utils.model.adapter import read_adapter_config
from utils.talk.source import find_source

NAME = "someone/no-such-thing"
# 한 프로세스에서 이름마다 모든 길을 지나며 거절의 말을 모은다. 무엇을 받지 못했는지는 길마다 다르다.
ROADS = """
import json, sys
from pathlib import Path
from utils import console
from utils.data import rows
from utils.errors import UsageError
from utils.merge import job
from utils.model import loader, tokenizer
from utils.talk import source
console.hush_libraries()
adapters, with_data = json.loads(sys.argv[1]), sys.argv[2] == "data"
cpu = loader.choose_device()
roads = {
    "config": lambda name: loader.load_config(name),
    "tokenizer": lambda name: tokenizer.load_tokenizer(name),
    "base": lambda name: loader.load_base(name, cpu),
    "merge": lambda name: job.find_base(name, {}, {}, None),
    "serve": lambda name: source.find_source(name, None, print),
    "serve adapter": lambda name: source.find_source(None, adapters[name], print),
}
if with_data:
    roads["data"] = lambda name: rows.load_hub(name)
said = {name: {} for name in adapters}
for name in adapters:
    for road, go in roads.items():
        try:
            go(name)
        except UsageError as error:
            said[name][road] = str(error)
print("SAID" + json.dumps(said))
"""
REFUSALS = [  # 상태, hub의 오류 이름, 이유, 할 일
    (401, "", "로그인", "hf auth login"),
    (401, "RepoNotFound", "없는 이름이거나 비공개다", "hf auth login"),  # hub는 없는 이름에도 401로 답한다
    (404, "RepoNotFound", "없는 이름이거나 비공개다", "hf auth login"),
    (403, "GatedRepo", "허락이 필요하다", "에서 동의"),
    (403, "Access to this resource is disabled.", "막아 두었다", "다른 것"),
    (404, "RevisionNotFound", "버전(revision)이 없다", "이름"),
]
NAMES = [f"{NAME}-{number}" for number in range(len(REFUSALS))]


class Refusing(http.server.BaseHTTPRequestHandler):
    """물은 이름에 정해 둔 상태와 hub의 오류 이름으로 답한다."""

    def do_GET(self):
        status, code = next(refusal[:2] for name, refusal in zip(NAMES, REFUSALS, strict=True) if name in self.path)
        self.send_response(status)
        if code:
            self.send_header("X-Error-Message" if " " in code else "X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        pass


def write_adapter(talk_run, folder, name: str):
    """닿을 수 없는 hub id를 기반 모델이라 말하는 어댑터."""
    shutil.copytree(talk_run, folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}),
                                                encoding="utf-8")
    return folder


@pytest.fixture
def adapter(talk_run, tmp_path):
    return write_adapter(talk_run, tmp_path / "adapter", NAME)


def walk(folder, talk_run, names: list[str], data: bool, **env: str) -> dict[str, dict[str, str]]:
    """이름마다, 길마다 나온 한 줄."""
    adapters = {name: str(write_adapter(talk_run, folder / name.split("/")[1], name)) for name in names}
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run([sys.executable, "-c", ROADS, json.dumps(adapters), "data" if data else "model"], cwd=ROOT,
                          env={**clean, "HF_HOME": str(folder / "hf"), "PYTHONIOENCODING": "utf-8", **env},
                          capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("SAID")[1])


def one_line_each(said: dict[str, str], name: str, data: bool) -> None:
    assert list(said) == ["config", "tokenizer", "base", "merge", "serve", "serve adapter", *(["data"] if data else [])]
    for road, line in said.items():
        assert "\n" not in line and name in line and "hub에서 " in line, (road, line)
        assert "--peft_root" not in line
    assert "--base_model" in said["serve adapter"]


@pytest.fixture(scope="module")
def refused(talk_run, tmp_path_factory):
    """`REFUSALS`대로 거절하는 hub에 닿아 본 모든 길의 말."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        return walk(tmp_path_factory.mktemp("refused"), talk_run, NAMES, True,
                    HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name, refusal", list(zip(NAMES, REFUSALS, strict=True)))
def test_every_road_tells_why_the_hub_refused(refused, name, refusal):
    _, _, why, advice = refusal
    one_line_each(refused[name], name, True)
    for road, line in refused[name].items():
        assert why in line and advice in line, (road, line)


@pytest.mark.parametrize("data, env, why", [
    (True, {"HF_HUB_OFFLINE": "1"}, "오프라인으로 정해 두었고"),
    (False, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "인터넷에 닿지 않"),
    (False, {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}, "인터넷에 닿지 않"),
])
def test_every_road_says_that_the_internet_is_out_of_reach(tmp_path, talk_run, data, env, why):
    said = walk(tmp_path, talk_run, [NAME], data, **env)[NAME]
    one_line_each(said, NAME, data)
    for road, line in said.items():
        assert why in line and f"hf download {NAME}" in line, (road, line)
        assert ("--repo-type dataset" in line) if road == "data" else ('--exclude "*.bin"' in line)


@pytest.mark.parametrize("number, why", [(errno.ENOSPC, "디스크가 찼다"), (errno.EDQUOT, "디스크가 찼다"),
                                         (errno.EACCES, "쓸 수 없는 폴더다"), (errno.EROFS, "쓸 수 없는 폴더다")])
def test_a_cache_that_cannot_be_written_is_named(number, why):
    try:
        try:
            raise OSError(number, os.strerror(number), "/cache/blob")
        except OSError as inner:
            raise RuntimeError("감쌌다") from inner
    except RuntimeError as error:
        said = str(hub.refusal("모델을", NAME, error))
    assert why in said and "/cache/blob" in said and "--cache_dir" in said and "\n" not in said


@pytest.mark.parametrize("error, why", [
    (ValueError('Unknown split "train". Should be one of [\'test\'].'), "train 부분이 없다"),
    (ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"), "여럿"),
    (RuntimeError("Dataset scripts are no longer supported, but found a.py"), "원격 코드"),
    (DataFilesNotFoundError("No (supported) data files found in x"), "데이터 파일이 없다"),
])
def test_data_that_cannot_be_used_as_it_is_says_why(error, why):
    said = str(hub.refusal("데이터를", NAME, error, data=True))
    assert why in said and "인터넷" not in said and "\n" not in said


def test_an_unknown_error_keeps_its_first_line():
    said = str(hub.refusal("데이터를", NAME, RuntimeError("처음 보는 일\n둘째 줄"), data=True))
    assert "RuntimeError: 처음 보는 일" in said and "둘째" not in said and "\n" not in said


def test_a_folder_is_itself(tiny_neox):
    assert hub.folder(tiny_neox) == tiny_neox


@pytest.mark.parametrize("script, flags", [
    ("generate.py", ("--ask", "안녕", "--base_model", NAME)),
    ("finetune-lora.py", ("--base_model", NAME, "--data_path", "DATA", "--output_dir", "OUT")),
    ("ko-datasets/download-koalpaca.py", ("--source", NAME, "--output", "OUT")),
])
def test_scripts_end_with_one_line_and_leave_nothing(tmp_path, tiny_data, script, flags):
    places = {"DATA": str(tiny_data), "OUT": str(tmp_path / "out")}
    done = run_script(script, *(places.get(flag, flag) for flag in flags))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("오류: hub에서 ") and NAME in done.stderr and not (tmp_path / "out").exists()


def test_an_adapter_on_the_hub_is_told_how_to_be_received(capsys):
    generate = load_script("generate.py")
    assert f"hf download {NAME}" in refuse(capsys, generate.serve, "--peft_root", NAME, "--ask", "안녕")


def test_an_adapter_of_an_unreachable_base_serves_on_a_base_given_by_hand(adapter, talk_run, capsys):
    """이름이 아니라 모양이 정한다. 다른 이름은 알리기만 한다."""
    base = read_adapter_config(talk_run)["base_model_name_or_path"]
    with pytest.raises(UsageError, match="--base_model"):
        find_source(None, str(adapter), print)
    source = find_source(base, str(adapter), print)
    assert source.base_model == base and f"주의: 기반 모델({base})" in capsys.readouterr().out
    same = find_source(None, str(talk_run), print)
    assert same.base_model == base and "주의" not in capsys.readouterr().out


def test_a_base_of_another_shape_is_refused(adapter, tiny_neox):
    source = find_source(str(tiny_neox), str(adapter), print)
    with pytest.raises(UsageError, match="어댑터를 얹지 못했다"):
        load_answerer(source, None, None, False, None, print)
