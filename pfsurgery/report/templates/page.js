"use strict";
(() => {
  const root = document.documentElement;
  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  const look = (layout) => {
    const style = getComputedStyle(root);
    const [paper, ink, faint, line, raised, sans] =
      ["paper", "ink", "faint", "line", "raised", "sans"].map((name) => style.getPropertyValue(`--${name}`).trim());
    const colors = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      "font.color": ink,
      "font.family": sans,
      "font.size": 13,
      "hoverlabel.bgcolor": raised,
      "hoverlabel.bordercolor": faint,
      "hoverlabel.font.color": ink,
    };
    for (const axis of Object.keys(layout).filter((name) => /^[xy]axis\d*$/.test(name))) {
      colors[`${axis}.gridcolor`] = line;
      colors[`${axis}.linecolor`] = faint;
      colors[`${axis}.tickfont.color`] = faint;
    }
    return colors;
  };
  const plots = [...document.querySelectorAll("script[data-for]")].map((script) => {
    const { data, layout } = JSON.parse(script.textContent);
    return { div: document.getElementById(script.dataset.for), data, layout };
  });
  const paint = () => plots.map(({ div, layout }) => Plotly.relayout(div, look(layout)));
  for (const { div, data, layout } of plots) {
    for (const [path, value] of Object.entries(look(layout))) {
      const names = path.split(".");
      const last = names.pop();
      names.reduce((at, name) => (at[name] ??= {}), layout)[last] = value;
    }
    Plotly.newPlot(div, data, layout, config);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  addEventListener("beforeprint", () => { root.classList.add("print"); paint(); });
  addEventListener("afterprint", () => { root.classList.remove("print"); paint(); });

  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      getSelection().selectAllChildren(code);
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Selected";
      }
    });
  }
})();
