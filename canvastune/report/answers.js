// Shows some of the answers: those of one outcome, or that hold some words.
(() => {
  "use strict";
  const bar = document.getElementById("filter");
  if (!bar) return; // no answers
  const [outcome, words, said] = [bar.querySelector("select"), bar.querySelector("input"), bar.querySelector("output")];
  const rows = [...document.querySelectorAll(".answers tbody tr")];
  const more = document.getElementById("more-answers");
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const filter = () => {
    const wanted = words.value.trim().toLowerCase();
    const active = wanted !== "" || outcome.value !== "";
    rows.forEach((row, index) => {
      row.hidden = !((outcome.value === "" || row.dataset.outcome === outcome.value) && texts[index].includes(wanted));
    });
    document.querySelectorAll(".answers").forEach((table) => { table.hidden = !table.querySelector("tbody tr:not([hidden])"); });
    if (more) more.open = active; // a row that fits may be among those that are folded away
    said.textContent = active ? `${rows.filter((row) => !row.hidden).length} of ${rows.length} answers on this page` : "";
  };
  outcome.addEventListener("change", filter);
  words.addEventListener("input", filter);
  bar.hidden = false;
})();
