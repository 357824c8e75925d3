"use strict";
const tip = document.getElementById("tip");
for (const drawn of document.querySelectorAll("svg [data-cell]")) {
  const title = drawn.querySelector("title");
  drawn.dataset.tip = title.textContent;
  drawn.closest("a").setAttribute("aria-label", title.textContent);
  title.remove();
}
document.addEventListener("pointerover", (event) => {
  const drawn = event.target.closest("[data-tip]");
  tip.classList.toggle("hidden", !drawn);
  if (!drawn) return;
  tip.textContent = drawn.dataset.tip;
  const left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8);
  tip.style.left = Math.max(8, left) + "px";
  const below = event.clientY + 16;
  tip.style.top = (below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : below) + "px";
});

const arms = document.querySelector(".arms");
arms.hidden = false;
function show() {
  const on = new Set([...arms.querySelectorAll("input:checked")].map((box) => box.dataset.arm));
  for (const item of document.querySelectorAll("[class*='arm-']")) {
    const own = [...item.classList].filter((name) => name.startsWith("arm-"));
    item.classList.toggle("hidden", !own.some((name) => on.has(name)));
  }
}
arms.addEventListener("change", show);

for (const link of document.querySelectorAll("[data-show]")) {
  link.addEventListener("click", () => {
    const row = link.dataset.show;
    for (const marked of document.querySelectorAll(".chosen")) marked.classList.remove("chosen");
    for (const marked of document.querySelectorAll(`[id="${row}"], [data-cell="${row}"]`)) marked.classList.add("chosen");
  });
}

function reveal() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let fold = target && target.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  if (target) target.scrollIntoView();
}
addEventListener("hashchange", reveal);
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
});
reveal();
