"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);

// Films: each holds its columns in one picture; here the rows are kept together.

function startFilms() {
  const films = [...document.querySelectorAll("video")];
  if (!films.length) return;
  const play = element("play"), slider = element("frame"), number = element("frame-number");
  const fps = Number(films[0].dataset.fps);
  const frameOf = (film) => Math.floor(film.currentTime * fps + 0.01);
  const show = (frame) => {
    slider.value = frame;
    number.textContent = `${Number(slider.value) + 1} of ${Number(slider.max) + 1}`;
  };
  const setPlaying = (isPlaying) => {
    for (const film of films) isPlaying ? film.play().catch(() => setPlaying(false)) : film.pause();
    play.textContent = isPlaying ? "Pause" : "Play";
    play.setAttribute("aria-pressed", isPlaying);
  };
  play.addEventListener("click", () => setPlaying(films[0].paused));
  slider.addEventListener("input", () => {
    setPlaying(false);
    for (const film of films) film.currentTime = (Number(slider.value) + 0.5) / fps;
    show(slider.value);
  });
  films[0].addEventListener("pause", () => show(frameOf(films[0])));
  const follow = () => {
    const leader = films[0];
    if (!leader.paused) {
      for (const film of films.slice(1)) {
        if (Math.abs(film.currentTime - leader.currentTime) > 1.5 / fps) film.currentTime = leader.currentTime;
      }
      show(frameOf(leader));  // while it stands, the slider is the reader's
    }
    requestAnimationFrame(follow);
  };
  show(0);
  element("player").hidden = false;
  setPlaying(!matchMedia("(prefers-reduced-motion: reduce)").matches);
  follow();
}

// Charts.

const charts = [];

async function loadLibrary() {
  const bytes = Uint8Array.from(atob(data.library), (letter) => letter.charCodeAt(0));
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(unpacked).text();
  document.head.append(script);
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

const dashes = ["solid", "dash", "dot", "dashdot"];

function traces(chart) {
  return chart.spec.series.map((series, index) => {
    const own = color(`c${series.color % 8}`);
    const isShort = series.x.length < 30;
    return {
      x: series.x, y: series.y, name: series.name || chart.spec.title, showlegend: false,
      visible: chart.isVisible[index], type: "scatter",
      mode: chart.spec.is_stacked ? "none" : chart.spec.is_dotted ? "markers" : isShort ? "lines+markers" : "lines",
      cliponaxis: false,
      stackgroup: chart.spec.is_stacked ? "all" : undefined, fillcolor: chart.spec.is_stacked ? own : undefined,
      line: { color: own, width: 2, dash: dashes[series.dash % 4] }, marker: { color: own, size: 6 },
      hovertemplate: "%{y:.4~g}",
    };
  });
}

function layout(chart) {
  const ink = color("ink"), faint = color("faint"), rule = color("rule");
  const shapes = data.marks.map((mark) => ({
    type: "line", xref: "x", yref: "paper", x0: mark.step, x1: mark.step, y0: 0, y1: 1,
    line: { color: mark.is_fault ? color("bad") : faint, width: 1.5, dash: "dot" },
  }));
  const [low, high] = chart.spec.healthy || [null, null];
  for (const limit of [low, high]) {
    if (limit !== null) shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: limit, y1: limit,
      line: { color: color("good"), width: 1.5, dash: "dash" } });
  }
  // Marks of one step share a label.
  const texts = new Map();
  for (const mark of data.marks) texts.set(mark.step, [...new Set([...(texts.get(mark.step) || []), mark.text])]);
  const annotations = [...texts].slice(0, 12).map(([step, words]) => ({
    x: step, y: 1, yref: "paper", xanchor: "left", yanchor: "top", textangle: 90, showarrow: false,
    text: words.length > 2 ? `${words[0]} + ${words.length - 1}` : words.join(", "), font: { size: 10, color: faint }, bgcolor: color("card"),
  }));
  const axis = { gridcolor: rule, zerolinecolor: rule, linecolor: rule, tickfont: { color: faint, size: 11 } };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink }, shapes, annotations,
    margin: { l: 52, r: 10, t: 8, b: 34 }, hovermode: "x unified", dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
    hoverlabel: { bgcolor: color("ground"), font: { color: ink } },
    xaxis: { ...axis, range, title: { text: "step", font: { size: 11, color: faint }, standoff: 4 }, tickformat: ",d" },
    yaxis: { ...axis, type: chart.isLogarithmic ? "log" : "linear", fixedrange: true, exponentformat: "power",
      rangemode: chart.spec.starts_at_zero ? "tozero" : "normal",
      autorangeoptions: isShare(chart) ? { clipmin: 0, clipmax: 1.02 } : undefined },
  };
}

// Accuracies, for instance: no axis of theirs needs more than 0 to 1.
function isShare(chart) {
  const values = chart.spec.series.flatMap((series) => series.y).filter((value) => value !== null);
  return values.length > 0 && values.every((value) => value >= 0 && value <= 1);
}

function draw(chart) {
  Plotly.react(chart.plot, traces(chart), layout(chart), { displayModeBar: false, responsive: true, doubleClick: false });
}

function drawAll() {
  for (const chart of charts) draw(chart);
}

function button(text, isPressed, onClick) {
  const made = document.createElement("button");
  made.type = "button";
  made.append(text);
  made.setAttribute("aria-pressed", isPressed);
  made.addEventListener("click", () => made.setAttribute("aria-pressed", onClick()));
  return made;
}

function addChart(grid, spec) {
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  const plot = document.createElement("div"), keys = document.createElement("div");
  const chart = { spec, plot, isVisible: spec.series.map(() => true), isLogarithmic: spec.is_logarithmic };
  figure.className = "chart";
  plot.className = "plot";
  keys.className = "keys";
  caption.append(spec.title);
  if (spec.is_logarithmic) {
    caption.append(button("log scale", true, () => {
      chart.isLogarithmic = !chart.isLogarithmic;
      draw(chart);
      return chart.isLogarithmic;
    }));
  }
  spec.series.forEach((series, index) => {
    if (!series.name) return;
    const key = button("", true, () => {
      chart.isVisible[index] = !chart.isVisible[index];
      draw(chart);
      return chart.isVisible[index];
    });
    const line = document.createElement("i");
    line.style.borderTopColor = `var(--c${series.color % 8})`;
    line.style.borderTopStyle = ["solid", "dashed", "dotted", "double"][series.dash % 4];
    key.append(line, series.name);
    keys.append(key);
  });
  const last = spec.series.map((series) => `${series.name} ${series.y.at(-1)}`).join(", ");
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `${spec.title}; last values: ${last}`);
  figure.append(caption, keys, plot);
  grid.append(figure);
  charts.push(chart);
  draw(chart);
  plot.on("plotly_relayout", (change) => {
    if ("xaxis.range[0]" in change) setRange(change["xaxis.range[0]"], change["xaxis.range[1]"]);
  });
  plot.on("plotly_doubleclick", () => setRange(...whole));
}

// One range of steps for all charts.

let whole = [0, 1], range = whole;

function setRange(first, last) {
  range = [Math.max(0, Math.round(first)), Math.max(Math.round(first) + 1, Math.round(last))];
  element("first").value = range[0];
  element("last").value = range[1];
  drawAll();
}

async function startCharts() {
  const steps = Object.values(data.sections).flat().flatMap((spec) => spec.series).flatMap((series) => series.x);
  if (!steps.length) return;
  await loadLibrary();
  whole = range = [0, Math.max(1, steps.reduce((most, step) => Math.max(most, step), 0))];
  element("first").value = range[0];
  element("last").value = range[1];
  const typed = () => setRange(Number(element("first").value) || 0, Number(element("last").value) || whole[1]);
  element("first").addEventListener("change", typed);
  element("last").addEventListener("change", typed);
  element("all").addEventListener("click", () => setRange(...whole));
  element("range").hidden = false;
  for (const section of document.querySelectorAll("[data-section]")) {
    for (const spec of data.sections[section.dataset.section]) addChart(section.querySelector(".grid"), spec);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  document.documentElement.dataset.ready = "true";
}

startFilms();
startCharts();
