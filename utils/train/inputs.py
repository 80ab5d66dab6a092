"""모델을 올리기 전에 갖추어지는 것들(`Inputs`). `stage.prepare`가 만들고 뒤의 단계들이 읽는다."""

from dataclasses import dataclass

from utils.data.blocks import PackedDataset, Split
from utils.data.dataset import Documents
from utils.data.encoder import Encoder
from utils.data.exams import Exam
from utils.model.loader import Device
from utils.train.records import BatchSize
from utils.train.tracking import TrackerChoice


@dataclass
class Inputs:
    """준비한 것.

    Attributes:
        config: 기반 모델의 config.json.
        end_id: 답의 끝에 배우는 토큰.
        end_ids: 답하다 만나면 멈출 토큰들.
        parts: 학습할 문서와 검증할 문서의 번호.
        eval_set: 검증할 블록. 검증하지 않으면 None이다.
        targets: LoRA를 붙일 층의 이름.
        exams: 학습한 다음 볼 시험들.
    """

    device: Device
    config: dict
    tokenizer: object
    end_id: int
    end_ids: tuple[int, ...]
    prompter: object
    encoder: Encoder
    documents: Documents
    parts: Split
    train_set: PackedDataset
    eval_set: PackedDataset | None
    batch: BatchSize
    data_sha256: str
    targets: tuple[str, ...]
    trackers: TrackerChoice
    exams: list[Exam]
