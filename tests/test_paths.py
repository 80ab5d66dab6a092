"""경로의 규칙: 옮겨진 저장소에서도 기반 모델을 찾고, 폴더의 이름을 hub id로 여기지 않는다. Windows의 경로도 같다."""

from pathlib import Path, PureWindowsPath

import pytest

from utils import paths
from utils.errors import UsageError
from utils.model import folder, loader

pytestmark = pytest.mark.quick


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """이름이 바뀐 저장소."""
    root = tmp_path / "새 저장소"
    for name in ("polyglot-ko-demo", "polyglot-ko-1.3b"):
        (root / "resources" / name).mkdir(parents=True)
        (root / "resources" / name / "config.json").write_text("{}", encoding="utf-8")
    (root / "ko-datasets").mkdir()
    (root / "ko-datasets" / "rows.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "ROOT", root)
    monkeypatch.setattr(loader, "ROOT", root)
    return root


@pytest.mark.parametrize("recorded, found", [
    ("/home/me/옛 저장소/resources/polyglot-ko-demo", "resources/polyglot-ko-demo"),
    (r"C:\Users\나\old\resources\polyglot-ko-demo", "resources/polyglot-ko-demo"),
    ("/mnt/d/models/polyglot-ko-1.3b", "resources/polyglot-ko-1.3b"),
    ("/gone/ko-datasets/rows.json", "ko-datasets/rows.json"),
    ("resources/polyglot-ko-demo", "resources/polyglot-ko-demo"),
])
def test_recorded_path_is_found_after_the_repository_moved(repository, recorded, found):
    assert Path(paths.find_recorded(recorded)) == repository / found


def test_a_base_that_was_renamed_is_found_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    for name, content in (("새 이름", "{}"), ("다른 것", "[]")):
        (tmp_path / "resources" / name).mkdir(parents=True)
        (tmp_path / "resources" / name / "config.json").write_text(content)
    renamed = tmp_path / "resources" / "새 이름"
    facts = {"base_model": {"id": folder.model_digest(renamed), "shown": "옛 이름"}}
    assert Path(folder.find_trained_base("/전에/resources/옛-이름", facts)) == renamed
    for recorded, other in (("EleutherAI/polyglot-ko-1.3b", facts), ("/전에/옛-이름", {})):
        assert folder.find_trained_base(recorded, other) == recorded


@pytest.mark.parametrize("recorded", ["EleutherAI/polyglot-ko-1.3b", "/gone/resources/other", "other"])
def test_what_is_not_here_stays_as_it_is_written(repository, recorded):
    assert paths.find_recorded(recorded) == recorded


def test_a_path_the_user_types_is_never_replaced(repository):
    assert paths.find_input("/gone/resources/polyglot-ko-demo") == "/gone/resources/polyglot-ko-demo"


@pytest.mark.parametrize("name, is_hub", [
    ("EleutherAI/polyglot-ko-1.3b", True), ("beomi/KoAlpaca-v1.1a", True), ("resources/none", False),
    ("train/faq", False), ("data/none", False), ("내 모델/기반", False), ("my models/base", False), ("./a/b", False),
    ("a/b/c", False), (r"resources\none", False), ("~/models", False), (r"C:\models", False), ("polyglot", False)])
def test_folder_names_are_not_hub_ids(repository, name, is_hub):
    assert paths.looks_like_hub_id(name) == is_hub


@pytest.mark.parametrize("missing", ["resources/polyglot-ko-1.3b-e5b16", "resources/내모델", "/gone/faq-merged",
                                     "resources/polyglot-ko-13b"])
def test_download_command_names_only_published_models(repository, missing):
    with pytest.raises(UsageError) as refused:
        loader.require_base(missing)
    assert 'hf download EleutherAI/polyglot-ko-1.3b --local-dir resources/polyglot-ko-1.3b --exclude "*.bin"' in str(
        refused.value)
    assert "polyglot-ko-demo" in str(refused.value)  # 여기에 있는 것


def test_download_command_keeps_the_place_of_a_published_name():
    command = folder.download_command(Path("resources/polyglot-ko-5.8b"))
    assert command.startswith("hf download EleutherAI/polyglot-ko-5.8b --local-dir resources/polyglot-ko-5.8b ")
    assert PureWindowsPath(r"resources\polyglot-ko-5.8b").as_posix() in command


def test_a_card_names_a_place_that_means_something_elsewhere(repository, tmp_path):
    (tmp_path / "faq.csv").write_text("가", encoding="utf-8")
    inside = paths.ROOT / "resources" / "polyglot-ko-demo"
    assert paths.portable(inside) == "resources/polyglot-ko-demo"
    assert paths.portable("faq.csv") == "faq.csv" == paths.portable(paths.ROOT / ".." / "faq.csv")
    assert paths.portable("EleutherAI/polyglot-ko-1.3b").startswith("Eleu")
    assert paths.located("faq.csv") == str(tmp_path / "faq.csv") and paths.located("소유자/이름") == "소유자/이름"


def test_a_tilde_that_the_shell_left_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert paths.at_home("data_path", "~/faq.csv") == str(tmp_path / "faq.csv")
    assert paths.at_home("peft_root", ("~/a", "b")) == (str(tmp_path / "a"), "b")
    assert paths.at_home("ask", "~/.bashrc가 뭐야?") == "~/.bashrc가 뭐야?"
    assert paths.at_home("output_dir", "~이름") == "~이름"


def test_a_file_given_for_a_folder_says_so(tmp_path):
    from utils.model.adapter import find_adapter

    for name in ("model.gguf", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"0")
        with pytest.raises(UsageError, match="폴더가 아니라 파일이다"):
            loader.require_base(tmp_path / name)
        with pytest.raises(UsageError, match="폴더가 아니라 파일이다"):
            find_adapter(tmp_path / name)
