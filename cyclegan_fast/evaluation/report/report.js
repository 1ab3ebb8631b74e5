// Values of a chart at the pointer or, with the arrow keys, at a point; and which section is being read.
(() => {
  "use strict";
  const words = (value) => (value === null ? "not finite" : String(value));

  for (const plot of document.querySelectorAll(".plot")) {
    const { x, y, span } = JSON.parse(plot.dataset.chart);
    const chart = plot.closest(".chart");
    const outputs = chart.querySelectorAll(".keys output");
    const labels = [...chart.querySelectorAll(".key")].map((key) => key.firstChild.textContent.trim());
    const [at, cursor] = [chart.querySelector(".at"), plot.querySelector(".cursor")];
    const last = [...outputs].map((output) => output.textContent);
    let place = x.length - 1;

    const show = (index) => {
      place = Math.min(x.length - 1, Math.max(0, index));
      const left = `${(100 * x[place]) / span[0]}%`;
      cursor.setAttribute("x1", left);
      cursor.setAttribute("x2", left);
      cursor.style.visibility = "visible";
      at.textContent = `epoch ${x[place]}`;
      outputs.forEach((output, line) => (output.textContent = words(y[line][place])));
      const values = labels.map((label, line) => `${label} ${words(y[line][place])}`);
      plot.setAttribute("aria-valuenow", place);
      plot.setAttribute("aria-valuetext", `epoch ${x[place]}: ${values.join(", ")}`);
    };
    const rest = () => {
      cursor.style.visibility = "hidden";
      at.textContent = "";
      outputs.forEach((output, line) => (output.textContent = last[line]));
    };
    const nearest = (epoch) =>
      x.reduce((best, value, index) => (Math.abs(value - epoch) < Math.abs(x[best] - epoch) ? index : best), 0);

    Object.entries({
      tabindex: 0, role: "slider", "aria-valuemin": 0, "aria-valuemax": x.length - 1,
      "aria-label": `Values of ${chart.querySelector("h3").textContent} by epoch`,
    }).forEach(([name, value]) => plot.setAttribute(name, value));
    show(place);
    rest();

    plot.addEventListener("pointermove", (event) => {
      const box = plot.querySelector("svg").getBoundingClientRect();
      show(nearest((span[0] * (event.clientX - box.left)) / box.width));
    });
    for (const end of ["pointerleave", "blur"]) plot.addEventListener(end, rest);
    plot.addEventListener("focus", () => show(place));
    plot.addEventListener("keydown", (event) => {
      const page = Math.ceil(x.length / 10);
      const steps = {
        ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -page, PageUp: page,
        Home: -x.length, End: x.length,
      };
      if (!(event.key in steps)) return;
      event.preventDefault();
      show(place + steps[event.key]);
    });
  }

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      links.forEach((link) => link.removeAttribute("aria-current"));
      links.get(target.id).setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-15% 0px -80% 0px" });
  document.querySelectorAll("main > section").forEach((section) => seen.observe(section));
})();
