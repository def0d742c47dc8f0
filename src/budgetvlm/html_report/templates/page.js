"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const narrow = () => window.innerWidth < 600;

  const save = (format) => (plot) => {
    const title = { text: figures[plot.id].title, x: 0.02, xanchor: "left", font: { size: 20 } };
    const margin = { ...plot.layout.margin, t: 60, l: 20, r: 30, b: 20 };
    const layout = { ...plot.layout, title, margin, paper_bgcolor: "#ffffff", width: undefined };
    const size = { width: 1000, height: Math.max(560, plot.layout.height + 60) };
    Plotly.toImage({ data: plot.data, layout: { ...layout, ...size } }, { format, ...size, scale: 2 }).then((url) => {
      const link = document.createElement("a");
      link.href = url;
      link.download = `${plot.id}.${format}`;
      link.click();
    });
  };

  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: true,
    modeBarButtons: [
      ["png", "svg"].map((format) => ({
        name: format,
        title: `Save as ${format.toUpperCase()}`,
        icon: format === "png" ? Plotly.Icons.camera : Plotly.Icons.disk,
        click: save(format),
      })),
      ["resetScale2d"],
    ],
  };

  const shape = (layout) => {
    const font = { ...layout.font, size: narrow() ? 11 : 13 };
    // A finger that scrolls the page must not zoom a plot.
    const axis = (a) => ({ ...a, fixedrange: narrow() });
    return { ...layout, font, dragmode: narrow() ? false : "zoom", xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis) };
  };

  for (const plot of plots) {
    const { data, layout } = figures[plot.id];
    Plotly.newPlot(plot, data, shape(layout), config);
  }

  // A sheet has about 680 CSS pixels between its margins; charts of a row share them.
  const forPaper = (plot) => {
    const width = plot.closest(".row") ? 325 : 660;
    Plotly.relayout(plot, { width, height: Math.min(figures[plot.id].layout.height, 330), "font.size": 10 });
  };
  const forScreen = (plot) => {
    const { height, font } = shape(figures[plot.id].layout);
    Plotly.relayout(plot, { width: null, autosize: true, height, "font.size": font.size });
  };
  window.addEventListener("beforeprint", () => plots.forEach(forPaper));
  window.addEventListener("afterprint", () => plots.forEach(forScreen));
})();
