// 브라우저 안에서만 하는 일: 밝기, 내 기록(localStorage), 파일로 내보내기, 남은 영어를 한국어로. 서버로 보내는 것은 없다.
window.lite = (() => {
  const KEY = "polyglot-ko-lite-talks";
  const DARK = "polyglot-ko-lite-dark";
  const LIMIT = 200;
  const JOINER = /\u2060/g; // page_turns.inert가 끼운 보이지 않는 글자
  const LIVE = /<(?=[A-Za-z/!?])|!(?=\[)|(?:```|~~~)[ \t]*(?=mermaid)/gi; // page_turns와 같은 자리
  const KOREAN = {
    "Connection to the server was lost. Attempting reconnection...": "서버와 연결이 끊겼어요. 다시 잇는 중이에요…",
    "Connection errored out.": "서버와 연결이 끊겼어요. 프로그램이 켜져 있는지 봐 주세요",
    "Connection Lost": "연결이 끊겼어요",
    "Connection re-established.": "다시 연결되었어요",
    Reconnected: "다시 연결되었어요",
    Error: "오류", Warning: "주의", Info: "알림", Success: "됐어요",
    "Scroll down": "맨 아래로", Liked: "좋은 답", Disliked: "나쁜 답", Copy: "복사", Copied: "복사했어요",
    "Copy code": "코드 복사", "chatbot conversation": "대화", Remove: "지우기", Close: "닫기",
    "Reset to default value": "처음 값으로", "More tabs": "다른 탭",
  };
  let opened = null; // 내 기록에서 이어서 대화하려고 고른 것

  const read = () => {
    try {
      const talks = JSON.parse(localStorage.getItem(KEY));
      return Array.isArray(talks) ? talks : [];
    } catch {
      return [];
    }
  };
  const write = (talks) => {
    talks = talks.slice(-LIMIT);
    while (talks.length) {
      try {
        localStorage.setItem(KEY, JSON.stringify(talks));
        break;
      } catch {
        talks.shift(); // 브라우저의 저장 자리가 가득 차면 오래된 것부터 지운다
      }
    }
    if (!talks.length) localStorage.removeItem(KEY);
    show();
  };
  const keep = (talk) => {
    if (!talk || !talk.said || !talk.said.length) return;
    write([...read().filter((one) => one.id !== talk.id), { ...talk, time: Date.now() }]);
  };

  const node = (tag, text, act) => {
    const made = document.createElement(tag);
    made.textContent = text;
    if (act) made.addEventListener("click", act);
    return made;
  };
  const mark = (said) => (said.draft && said.good ? " (더 나은 답)" : said.good ? " (좋은 답)" : said.good === false ? " (나쁜 답)" : "");
  const card = (talk) => {
    const made = document.createElement("article");
    for (const said of talk.said) {
      made.append(node(said.role === "user" ? "h3" : "p", said.text + mark(said)));
      if (said.other) made.append(node("small", "비교한 답: "), node("p", said.other));
    }
    made.append(
      node("button", "이어서 대화하기", () => { opened = talk; document.getElementById("reopen").click(); }),
      node("button", "지우기", () => write(read().filter((one) => one.id !== talk.id))),
      node("small", `${new Date(talk.time).toLocaleString("ko-KR")} · ${talk.model}`));
    return made;
  };
  const show = () => {
    const list = document.getElementById("history-list");
    if (!list) return;
    const talks = read().reverse();
    list.replaceChildren(...talks.map(card));
    if (!talks.length) list.append(node("p", "아직 기록이 없어요."));
  };

  const messages = (talk, said) => [
    ...(talk.system ? [{ role: "system", content: talk.system }] : []),
    ...said.map(({ role, text }) => ({ role, content: text })),
  ];
  // 좋다고 한 답만 배운다. 나머지 답은 weight 0으로 앞뒤를 읽게만 한다
  const trainingRow = (talk) => {
    const last = talk.said.findLastIndex((said) => said.good);
    if (last < 0) return null;
    const row = messages(talk, talk.said.slice(0, last + 1));
    const first = row.length - last - 1;
    talk.said.slice(0, last + 1).forEach((said, place) => {
      if (said.role === "assistant" && !said.good) row[first + place].weight = 0;
    });
    return { messages: row };
  };
  // 두 답 가운데 나은 것과 못한 것: 고쳐 쓰거나 다시 답한 것과 처음의 답, 또는 나란히 비교하며 엄지를 누른 두 답
  const ranked = ({ text, draft, other, good }) =>
    good ? [text, draft || other] : good === false ? [other, text] : [];
  const pairsOf = (talk) => talk.said.flatMap((said, place) => {
    const [better, worse] = ranked(said);
    if (!better?.trim() || !worse?.trim() || better.trim() === worse.trim()) return [];
    return [{
      prompt: messages(talk, talk.said.slice(0, place)),
      chosen: [{ role: "assistant", content: better }],
      rejected: [{ role: "assistant", content: worse }],
    }];
  });
  const save = (name, text, type) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const saveLines = (name, rows, empty) => {
    document.getElementById("history-notice").textContent = rows.length ? `${rows.length}줄을 내려받았어요.` : empty;
    if (rows.length) save(name, rows.map((row) => JSON.stringify(row) + "\n").join(""), "application/x-ndjson");
  };

  const korean = (root) => {
    for (const attribute of ["aria-label", "title"]) {
      for (const found of root.querySelectorAll(`[${attribute}]`)) {
        const said = found.getAttribute(attribute);
        const word = KOREAN[said] || (/^(number input|range slider) for /.test(said) && said.replace(/^.* for /, ""));
        if (word) found.setAttribute(attribute, word);
      }
    }
    for (const toast of root.querySelectorAll(".toast-body")) {
      const texts = document.createTreeWalker(toast, NodeFilter.SHOW_TEXT);
      while (texts.nextNode()) {
        const word = KOREAN[texts.currentNode.data.trim()];
        if (word) texts.currentNode.data = word;
      }
    }
  };
  const setDark = (dark) => document.body.classList.toggle("dark", dark);
  const clean = (text) => String(text).replace(JOINER, "");

  return {
    start() {
      const saved = localStorage.getItem(DARK);
      if (saved !== null) setDark(saved === "1");
      document.documentElement.lang = "ko";
      if (navigator.clipboard) {
        const copy = navigator.clipboard.writeText.bind(navigator.clipboard);
        navigator.clipboard.writeText = (text) => copy(clean(text));
      }
      document.addEventListener("copy", (event) => {
        const picked = String(document.getSelection());
        if (!picked.includes("\u2060")) return;
        event.clipboardData.setData("text/plain", clean(picked));
        event.preventDefault();
      });
      // 고친 글은 서버에 다녀오기 전에 한 번 그려진다. 그때도 HTML과 그림이 되지 않게 한다
      document.addEventListener("click", (event) => {
        if (!event.target.closest('[aria-label="고친 글 보내기"]')) return;
        for (const box of document.querySelectorAll("#chat .message-row textarea")) {
          box.value = clean(box.value).replace(LIVE, "$&\u2060");
          box.dispatchEvent(new Event("input", { bubbles: true }));
        }
      }, true);
      // 한글을 조합하는 동안의 Enter는 글자를 마치는 것이지 보내는 것이 아니다
      for (const kind of ["keydown", "keypress"]) {
        document.addEventListener(kind, (event) => {
          if (event.key !== "Enter" || !event.isComposing) return;
          event.stopImmediatePropagation();
          if (kind === "keypress") event.preventDefault();
        }, true);
      }
      new MutationObserver(() => korean(document.body)).observe(document.body, { childList: true, subtree: true });
      korean(document.body);
      show();
    },
    theme() {
      const dark = !document.body.classList.contains("dark");
      setDark(dark);
      localStorage.setItem(DARK, dark ? "1" : "0");
    },
    show,
    keep,
    chosen: () => (({ id, system, model, said }) => ({ id, system, model, said }))(opened),
    remember(instruction, input, answer, status, other) {
      if (!answer) return;
      const question = !input ? instruction : /\{[^{}]*\}/.test(instruction)
        ? instruction.replace(/\{[^{}]*\}/g, () => input) : `${instruction}\n\n${input}`;
      keep({ id: `form-${Date.now()}`, system: "", model: status, said: [
        { role: "user", text: question, good: null, draft: "", other: null },
        { role: "assistant", text: answer, good: null, draft: "", other: other || null }] });
    },
    exportTraining() {
      saveLines("polyglot-ko-lite-train.jsonl", read().map(trainingRow).filter(Boolean),
        "좋다고 표시하거나 고쳐 쓴 답이 아직 없어요. 대화 탭에서 답 아래의 엄지나 연필을 눌러 주세요.");
    },
    exportPairs() {
      saveLines("polyglot-ko-lite-pairs.jsonl", read().flatMap(pairsOf),
        "두 답을 비교한 표시가 아직 없어요. 대화 탭에서 연필을 눌러 더 나은 답을 적거나, 나쁘다고 한 답을 다시 답하게 하거나, 두 모델을 나란히 비교하며 엄지를 눌러 주세요.");
    },
    exportAll() {
      save("polyglot-ko-lite-talks.json", JSON.stringify(read(), null, 2), "application/json");
    },
    clear() {
      if (confirm("이 브라우저에 남은 기록을 모두 지울까요?")) write([]);
    },
    exportCsv(text) {
      if (text) save("polyglot-ko-lite-eval.csv", text, "text/csv;charset=utf-8");
    },
  };
})();
