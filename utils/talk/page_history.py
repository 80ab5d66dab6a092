"""내 기록 탭: 이 브라우저에 남은 대화들과, 그것으로 만드는 학습 데이터. 목록과 파일은 page.js가 만든다."""

import gradio as gr


def history_tab(tab: gr.Tab) -> None:
    """지금 만드는 탭에 칸과 일을 놓는다."""
    gr.Markdown("대화는 이 브라우저에만 남아요. 좋다고 표시한 답과 고쳐 쓴 답을 학습 데이터로 내려받아 "
                "`python finetune-lora.py --data_path 내려받은파일.jsonl`로 다음 어댑터를 가르칠 수 있어요. 선호 쌍은 "
                "연필로 고쳐 쓴 답을 원래 답보다, 나란히 비교하며 엄지로 고른 답을 다른 답보다 높이 매기도록(DPO) "
                "가르쳐요.")
    with gr.Row(elem_id="history-buttons"):
        train = gr.Button("학습 데이터 (.jsonl)", variant="primary", elem_id="history-train", min_width=150)
        pairs = gr.Button("선호 쌍 (.jsonl)", elem_id="history-pairs", min_width=130)
        keep = gr.Button("모두 (.json)", elem_id="history-export", min_width=110)
        forget = gr.Button("모두 지우기", variant="stop", elem_id="history-clear", min_width=110)
    gr.HTML('<p id="history-notice" role="status"></p><div id="history-list"></div>')
    for trigger, action in ((train.click, "exportTraining"), (pairs.click, "exportPairs"), (keep.click, "exportAll"),
                            (forget.click, "clear"), (tab.select, "show")):
        trigger(None, js=f"() => lite.{action}()", api_visibility="private")
