// Filters the answers by outcome and by text.
(() => {
  "use strict";
  const bar = document.getElementById("filter");
  if (!bar) return; // no answers
  const [outcome, search, output] = [bar.querySelector("select"), bar.querySelector("input"), bar.querySelector("output")];
  const rows = [...document.querySelectorAll(".answers tbody tr")];
  const more = document.getElementById("more-answers");
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const filter = () => {
    const wanted = search.value.trim().toLowerCase();
    const active = wanted !== "" || outcome.value !== "";
    rows.forEach((row, index) => {
      row.hidden = !((outcome.value === "" || row.dataset.outcome === outcome.value) && texts[index].includes(wanted));
    });
    document.querySelectorAll(".answers").forEach((table) => { table.hidden = !table.querySelector("tbody tr:not([hidden])"); });
    if (more) more.open = active; // a match may be among the folded rows
    output.textContent = active ? `${rows.filter((row) => !row.hidden).length} of ${rows.length} answers on this page` : "";
  };
  outcome.addEventListener("change", filter);
  search.addEventListener("input", filter);
  bar.hidden = false;
})();
