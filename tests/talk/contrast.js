// 보이는 글(누를 수 없는 단추는 빼고) 가운데 글과 바탕의 명암비(WCAG)가 4.5에 못 미치는 것들. 바탕은 투명하지 않은 색을 만날 때까지 거슬러 찾는다.
() => {
  const color = (text) => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
    return [red, green, blue, alpha / 255];
  };
  const over = (top, under) => top.slice(0, 3).map((one, at) => one * top[3] + under[at] * (1 - top[3]));
  const light = (rgb) => {
    const [red, green, blue] = rgb.map((one) => (one / 255 <= 0.04045 ? one / 255 / 12.92 : ((one / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const ground = (node) => {
    const layers = [];
    for (let one = node; one; one = one.parentElement) {
      const found = color(getComputedStyle(one).backgroundColor);
      if (found[3]) layers.push(found);
      if (found[3] === 1) break;
    }
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const seen = (node) => {
    const box = node.getBoundingClientRect();
    return node.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && box.width > 2 && box.height > 2;
  };
  const weak = [];
  const check = (node, pseudo, text) => {
    const back = ground(node);
    const ink = over(color(getComputedStyle(node, pseudo).color), back);
    const [high, low] = [light(ink), light(back)].sort((one, other) => other - one);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) weak.push(`${text.trim().slice(0, 30)} ${ratio.toFixed(2)} <${node.tagName} ${node.className}>`);
  };
  for (const node of document.querySelectorAll("body *")) {
    if (["SCRIPT", "STYLE", "OPTION"].includes(node.tagName) || node.closest("button:disabled") || !seen(node)) continue;
    const text = [...node.childNodes].filter((one) => one.nodeType === 3).map((one) => one.data).join("");
    if (text.trim()) check(node, null, text);
    if (node.value && node.matches("textarea, input:not([type=checkbox])")) check(node, null, String(node.value));
    if (node.placeholder && !node.value) check(node, "::placeholder", node.placeholder);
  }
  return weak;
}
