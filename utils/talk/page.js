// 브라우저 안에서만 하는 일: 밝기, 내 기록(localStorage), 파일로 내보내기. 서버로 보내는 것은 없다.
window.lite = (() => {
  const KEY = "polyglot-ko-lite-history";
  const LIMIT = 200;

  const read = () => {
    try {
      const rows = JSON.parse(localStorage.getItem(KEY));
      return Array.isArray(rows) ? rows : [];
    } catch {
      return [];
    }
  };
  const write = (rows) => {
    while (rows.length) {
      try {
        localStorage.setItem(KEY, JSON.stringify(rows));
        break;
      } catch {
        rows.shift(); // 브라우저의 저장 자리가 가득 차면 오래된 것부터 지운다
      }
    }
    if (!rows.length) localStorage.removeItem(KEY);
    show();
  };
  const line = (tag, text) => {
    const node = document.createElement(tag);
    node.textContent = text;
    return node;
  };
  const show = () => {
    const list = document.getElementById("history-list");
    if (!list) return;
    const rows = read().reverse();
    list.replaceChildren(...rows.map((row) => {
      const card = document.createElement("article");
      card.append(line("h3", row.input ? `${row.instruction} [${row.input}]` : row.instruction), line("p", row.answer));
      if (row.base) card.append(line("small", "기반 모델: "), line("p", row.base));
      card.append(line("small", `${new Date(row.time).toLocaleString("ko-KR")} · ${row.status}`));
      return card;
    }));
    if (!rows.length) list.append(line("p", "아직 기록이 없다."));
  };
  const save = (name, text, type) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const setDark = (dark) => document.body.classList.toggle("dark", dark);

  return {
    start() {
      const saved = localStorage.getItem("polyglot-ko-lite-dark");
      if (saved !== null) setDark(saved === "1");
      show();
    },
    theme() {
      const dark = !document.body.classList.contains("dark");
      setDark(dark);
      localStorage.setItem("polyglot-ko-lite-dark", dark ? "1" : "0");
    },
    show,
    remember(instruction, input, answer, status, base) {
      if (!answer) return;
      write([...read(), { time: Date.now(), instruction, input, answer, status, base }].slice(-LIMIT));
    },
    exportHistory() {
      save("polyglot-ko-lite-history.json", JSON.stringify(read(), null, 2), "application/json");
    },
    clearHistory() {
      if (confirm("이 브라우저에 남은 기록을 모두 지울까?")) write([]);
    },
    exportCsv(text) {
      if (text) save("polyglot-ko-lite-eval.csv", text, "text/csv;charset=utf-8");
    },
  };
})();
