// Browsing answers: sort, filter, and show a page at a time. Without script the whole table is there.
"use strict";
for (const browser of document.querySelectorAll("[data-browser]")) {
  const PAGE = 15;
  const body = browser.querySelector("tbody");
  const heads = [...browser.querySelectorAll("th[data-key]")];
  const text = browser.querySelector("[data-text]");
  const filters = [...browser.querySelectorAll("[data-filter]")];
  const order = browser.querySelector("[data-order]");
  const shown = browser.querySelector("[data-shown]");
  const more = browser.querySelector(".more");
  const rows = [...body.rows].map((row) => ({
    row,
    text: row.textContent.toLowerCase(),
    category: row.dataset.category,
    outcome: row.dataset.outcome,
    question: row.querySelector(".question").textContent,
    alignment: row.dataset.alignment,
    coherence: row.dataset.coherence,
  }));
  let key = "alignment";
  let direction = 1;
  let limit = PAGE;

  const numeric = () => key === "alignment" || key === "coherence";
  const compare = (a, b) => {
    if (!numeric()) return direction * a[key].localeCompare(b[key]);
    if (a[key] === "" || b[key] === "") return (a[key] === "") - (b[key] === ""); // no score: last, either way
    return direction * (Number(a[key]) - Number(b[key]));
  };

  const update = () => {
    const words = text.value.toLowerCase();
    const found = rows.filter(
      (item) =>
        item.text.includes(words) &&
        filters.every((select) => select.value === "" || item[select.dataset.filter] === select.value),
    );
    found.sort(compare);
    body.replaceChildren(...found.slice(0, limit).map((item) => item.row));
    const count = Math.min(limit, found.length);
    shown.textContent = found.length
      ? `${count} of ${found.length} shown` + (found.length < rows.length ? `, ${rows.length} in all` : "")
      : `none of ${rows.length} answers match`;
    more.hidden = found.length <= limit;
    for (const head of heads) {
      if (head.dataset.key === key) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    }
    const value = `${key}:${direction}`;
    order.selectedIndex = [...order.options].findIndex((option) => option.value === value);
  };
  const restart = () => {
    limit = PAGE;
    update();
  };

  for (const item of rows) {
    const answer = item.row.querySelector(".answer");
    if (answer.textContent.length > 360) {
      answer.classList.add("clamped");
      answer.title = "Click to see the whole answer";
      answer.addEventListener("click", () => answer.classList.toggle("clamped"));
    }
  }
  for (const head of heads) {
    head.tabIndex = 0;
    const sort = () => {
      direction = head.dataset.key === key ? -direction : 1;
      key = head.dataset.key;
      restart();
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        sort();
      }
    });
  }
  order.addEventListener("change", () => {
    const [name, sign] = order.value.split(":");
    key = name;
    direction = Number(sign);
    restart();
  });
  text.addEventListener("input", restart);
  for (const select of filters) select.addEventListener("change", restart);
  more.firstElementChild.addEventListener("click", () => {
    limit += 4 * PAGE;
    update();
  });
  browser.querySelector(".tools").hidden = false;
  update();
}
