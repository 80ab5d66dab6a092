"""글과 코드는 개발자가 검색하는 낱말을 쓴다. 옛 낱말은 어디에도 없다."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
OLD_WORDS = ("까닭", "견주", "견준", "견줄", "견줘", "그릇", "준비 운동", "깔린", "깔려", "깔면", "깔았", "깐다",
             "빈 곳", "빗금", "열쇠", "라이센스", "허가서", "쌍점", "벌점", "쓰레기 수집", "씨앗")


def readable_files():
    patterns = ("*.py", "*.md", "*/README.md", "requirements.txt", ".create-symbolic-links.bat", ".ci/*", ".ruff.toml",
                "utils/**/*.py", "utils/**/*.md", "utils/**/*.cu", "utils/**/*.cuh", "utils/**/*.js", "utils/**/*.css",
                "tests/**/*.py", "tests/**/*.md", "tests/**/*.txt", "tests/**/*.[ch]", "tests/**/*.js",
                "templates/*.json", "ko-datasets/*.py", "resources/*/*.py", "resources/*/*.md", ".github/**/*.md",
                ".github/**/*.yml")
    return sorted({file for pattern in patterns for file in ROOT.glob(pattern)} - {Path(__file__).resolve()})


@pytest.mark.parametrize("word", OLD_WORDS)
def test_words_that_developers_search_for(word):
    places = [f"{file.relative_to(ROOT)}:{number}" for file in readable_files()
              for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1) if word in line]
    assert not places, f"{word}: {places[:10]}"


def test_a_file_opens_with_what_it_is():
    """첫 문장은 그것이 무엇인지 말한다. "…을 맡는다"로 끝나는 문장은 모든 파일에 맞아서 아무것도 말하지 않는다."""
    openings = {file: file.read_text(encoding="utf-8").splitlines()[:1] for file in readable_files()}
    assert not [str(file.relative_to(ROOT)) for file, line in openings.items() if line and "맡는다" in line[0]]
