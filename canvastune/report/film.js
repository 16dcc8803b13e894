// Shows one moment of the film at a time: of every block before it the last frame, of the block in work the one at hand. Both sides
// have as many moments in a block as the longer of them has frames there. Without this script all frames stand one below the other.
(() => {
  "use strict";
  const film = document.getElementById("film");
  if (!film) return; // none was recorded
  const [slider, said] = [film.querySelector("input"), film.querySelector("output")];
  const sides = [...film.querySelectorAll(".frames")].map((list) => {
    const blocks = [];
    for (const frame of list.children) (blocks[frame.dataset.block] ??= []).push(frame);
    return blocks;
  });
  const moments = [];
  for (let block = 0; block < Math.max(...sides.map((blocks) => blocks.length)); block++) {
    const frames = Math.max(...sides.map((blocks) => blocks[block]?.length ?? 0));
    for (let at = 0; at < frames; at++) moments.push([block, at]);
  }
  const show = () => {
    const [block, at] = moments[slider.value];
    const words = [`Block ${block + 1}`];
    for (const blocks of sides) {
      blocks.forEach((frames, index) => frames.forEach((frame, order) => {
        const wanted = index < block ? frames.length - 1 : index === block ? Math.min(at, frames.length - 1) : -1;
        frame.classList.toggle("shown", order === wanted);
        frame.style.gridRow = index + 1; // frames of a block lie upon each other, so that nothing moves while they change
        if (index === block && order === wanted) words.push(frame.dataset.words);
      }));
    }
    said.textContent = words.join(", ");
    slider.setAttribute("aria-valuetext", words.join(", "));
  };
  slider.max = moments.length - 1;
  slider.value = 0;
  slider.addEventListener("input", show);
  film.classList.add("live-film");
  slider.closest("[hidden]").hidden = false;
  show();
})();
