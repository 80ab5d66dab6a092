"""학습하는 계산이 모델의 계산과 같음을, 그리고 다르면 시작할 때 드러남을 확인한다."""

import pytest
from conftest import build_tokenizer

from utils.errors import UsageError
from utils.loader import require_known_ids


def test_token_outside_the_embedding_is_named(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    tokenizer.add_tokens(["<|새 토큰|>"])
    new = len(tokenizer) - 1
    require_known_ids([0, new - 1], new, tokenizer, "데이터")
    with pytest.raises(UsageError, match=rf"데이터에.*새 토큰.*{new}.*{new}행"):
        require_known_ids([0, new], new, tokenizer, "데이터")
