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
