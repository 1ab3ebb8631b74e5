// The slider between two pictures: by the range (keyboard, touch), by dragging, and at one picture pixel a screen pixel.
(() => {
  "use strict";
  const parts = (compare) => ({
    view: compare.querySelector(".cf-view"),
    stage: compare.querySelector(".cf-stage"),
    range: compare.querySelector(".cf-range"),
    zoom: compare.querySelector(".cf-zoom"),
  });

  // What of the picture can be seen: its left edge and width, in CSS pixels of the stage.
  const seen = ({ view, stage }) => ({
    left: Math.max(0, view.scrollLeft - stage.offsetLeft),
    width: Math.max(1, Math.min(stage.offsetWidth, view.clientWidth)),
  });

  // The line stands at a share of what can be seen, so that it is never out of sight at 100 %.
  const place = (compare) => {
    const { stage, range } = parts(compare);
    const share = Number(compare.dataset.share ?? 50);
    const { left, width } = seen(parts(compare));
    stage.style.setProperty("--split", `${left + (share / 100) * width}px`);
    range.setAttribute("aria-valuetext", `${Math.round(share)} % before`);
  };

  const slide = (compare, share) => {
    compare.dataset.share = String(Math.min(100, Math.max(0, share)));
    parts(compare).range.value = compare.dataset.share;
    place(compare);
  };

  const layOut = (compare) => {
    const { view, stage } = parts(compare);
    const width = compare.dataset.width / devicePixelRatio;
    const height = compare.dataset.height / devicePixelRatio;
    const full = compare.classList.contains("cf-full");
    const room = Math.max(200, 0.82 * innerHeight);
    const fitted = Math.min(Math.max(width, compare.dataset.least ?? 0), view.clientWidth, (room * width) / height);
    stage.style.width = `${full ? width : fitted}px`;
    place(compare);
  };

  // Zooms around a point of the view, given as shares of the picture.
  const zoomTo = (compare, full, x = 0.5, y = 0.5) => {
    const { view, stage, zoom } = parts(compare);
    compare.classList.toggle("cf-full", full);
    zoom.setAttribute("aria-pressed", String(full));
    layOut(compare);
    view.scrollLeft = x * stage.offsetWidth - view.clientWidth / 2;
    view.scrollTop = y * stage.offsetHeight - view.clientHeight / 2;
    place(compare);
  };

  const owner = (event) => event.target instanceof Element && event.target.closest(".cf-compare");
  const shareAt = (compare, x) => {
    const { stage } = parts(compare);
    const { left, width } = seen(parts(compare));
    return (100 * (x - stage.getBoundingClientRect().left - left)) / width;
  };

  document.addEventListener("input", (event) => {
    if (event.target.matches?.(".cf-range")) slide(owner(event), Number(event.target.value));
  });
  document.addEventListener("click", (event) => {
    const compare = owner(event);
    if (compare && event.target.closest(".cf-zoom")) zoomTo(compare, !compare.classList.contains("cf-full"));
  });
  document.addEventListener("dblclick", (event) => {
    const compare = owner(event);
    if (!compare || !event.target.closest(".cf-stage")) return;
    const box = parts(compare).stage.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    zoomTo(compare, !compare.classList.contains("cf-full"), x, y);
  });

  // A drag moves the line; at 100 %, unless it began at the line, it moves the picture (fingers scroll by themselves).
  let drag = null;
  document.addEventListener("pointerdown", (event) => {
    const compare = owner(event);
    if (!compare || event.button !== 0 || !event.target.closest(".cf-stage")) return;
    const pans = compare.classList.contains("cf-full") && !event.target.closest(".cf-line");
    if (pans && event.pointerType !== "mouse") return;
    drag = { compare, pans, x: event.clientX, y: event.clientY };
    if (!pans) slide(compare, shareAt(compare, event.clientX));
  });
  document.addEventListener("pointermove", (event) => {
    if (!drag) return;
    if (drag.pans) {
      const { view } = parts(drag.compare);
      view.scrollBy(drag.x - event.clientX, drag.y - event.clientY);
      [drag.x, drag.y] = [event.clientX, event.clientY];
    } else {
      slide(drag.compare, shareAt(drag.compare, event.clientX));
    }
  });
  for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, () => (drag = null));

  const onScroll = (event) => {
    if (event.target instanceof Element && event.target.matches(".cf-view")) place(owner(event));
  };
  document.addEventListener("scroll", onScroll, true);
  const all = () => document.querySelectorAll(".cf-compare").forEach(layOut);
  addEventListener("resize", all);
  // A new comparison is laid out before its pictures have come.
  new MutationObserver((changes) => {
    if (changes.some((change) => [...change.addedNodes].some((node) => node.querySelector?.(".cf-stage")))) all();
  }).observe(document, { childList: true, subtree: true });
  all();
})();
