// Shows one moment of the denoising trace at a time: the last frame of every earlier block and the
// current frame of the current block. In a block, both sides have as many moments as the longer of
// them has frames. Without this script all frames are listed one below the other.
(() => {
  "use strict";
  const trace = document.getElementById("trace");
  if (!trace) return; // none was recorded
  const [slider, output] = [trace.querySelector("input"), trace.querySelector("output")];
  const sides = [...trace.querySelectorAll(".frames")].map((list) => {
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
    const labels = [`Block ${block + 1}`];
    for (const blocks of sides) {
      blocks.forEach((frames, index) => frames.forEach((frame, order) => {
        const wanted = index < block ? frames.length - 1 : index === block ? Math.min(at, frames.length - 1) : -1;
        frame.classList.toggle("shown", order === wanted);
        frame.style.gridRow = index + 1; // frames of a block overlap, so that nothing moves when they change
        if (index === block && order === wanted) labels.push(frame.dataset.label);
      }));
    }
    output.textContent = labels.join(", ");
    slider.setAttribute("aria-valuetext", labels.join(", "));
  };
  slider.max = moments.length - 1;
  slider.value = Math.floor(slider.max / 2); // something has formed, and something has yet to
  slider.addEventListener("input", show);
  trace.classList.add("live-trace");
  slider.closest("[hidden]").hidden = false;
  show();
})();
