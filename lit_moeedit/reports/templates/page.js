"use strict";
// an enhancement: without scripts, all facts are shown and the filters are not
(() => {
  const filters = document.getElementById("filters");
  if (!filters) return;
  const rows = [...document.querySelectorAll("#facts tbody tr")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const words = document.getElementById("words");
  const outcome = document.getElementById("outcome");
  const shown = document.getElementById("shown");
  const update = () => {
    const wanted = words.value.toLowerCase();
    let count = 0;
    rows.forEach((row, i) => {
      row.hidden = !(texts[i].includes(wanted) && (!outcome.value || row.dataset.outcome === outcome.value));
      count += row.hidden ? 0 : 1;
    });
    shown.textContent = `${count} of ${rows.length} shown`;
  };
  filters.hidden = false;
  words.addEventListener("input", update);
  outcome.addEventListener("change", update);
})();
// headings become buttons: ascending, descending, and the order of the page again
(() => {
  const value = (cell) => {
    const text = cell.dataset.value ?? cell.textContent.trim();
    const isNumber = cell.dataset.value !== undefined || cell.classList.contains("n");
    return isNumber ? parseFloat(text.replaceAll(",", "")) : text;
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0];
    const headings = [...(table.tHead?.rows[0].cells ?? [])];
    const rows = [...(body?.rows ?? [])];
    if (rows.length < 2) continue;
    table.classList.add("sortable");
    headings.forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const next = { ascending: "descending", descending: null }[heading.getAttribute("aria-sort")];
        headings.forEach((other) => other.removeAttribute("aria-sort"));
        if (next === null) return body.append(...rows);
        heading.setAttribute("aria-sort", next ?? "ascending");
        const sign = next ? -1 : 1;
        const isEmpty = (key) => key === "" || Number.isNaN(key);
        const keyed = rows.map((row) => ({ row, key: value(row.cells[column]) }));
        const filled = keyed.filter(({ key }) => !isEmpty(key)).sort((a, b) => sign * compare(a.key, b.key));
        body.append(...[...filled, ...keyed.filter(({ key }) => isEmpty(key))].map(({ row }) => row));
      });
    });
  }
})();
