// Plots, each drawn from the table it stands beside: one source of numbers for eyes, readers and
// tests. Colours are the page's own variables, so light and dark are one drawing.
"use strict";

(() => {
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const clock = new Intl.DateTimeFormat(undefined, { dateStyle: "short", timeStyle: "medium" });
  const axisSeconds = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
  const axisClock = new Intl.DateTimeFormat(undefined, { timeStyle: "short" });
  const axisDay = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric" });
  const plots = new Map(); // figure -> ECharts instance

  const font = () => getComputedStyle(document.body).fontFamily; // by name: labels are measured with it
  const ink = () => ({ color: css("ink"), fontFamily: font(), fontSize: 12 });
  const line = () => ({ lineStyle: { color: css("line") } });
  const tooltip = (more) => ({
    renderMode: "richText", // HTML tips carry inline styles, which the page's policy forbids
    confine: true,
    backgroundColor: css("surface"),
    borderColor: css("strong"),
    textStyle: ink(),
    ...more,
  });
  const length = (ms) => {
    const s = ms / 1000;
    return s < 120 ? `${s.toFixed(1)} s` : s < 7200 ? `${(s / 60).toFixed(0)} min` : `${(s / 3600).toFixed(1)} h`;
  };

  // Lanes: rows carry data-spans = [[word, from, to], ...], unix ms; one colour a word.
  function lanes(table) {
    const rows = [...table.tBodies[0].rows].filter((row) => row.dataset.spans).slice(0, 40);
    const names = rows.map((row) => row.dataset.lane ?? row.cells[0].innerText.trim());
    const spans = rows.flatMap((row, at) => JSON.parse(row.dataset.spans).map((span) => [at, ...span]));
    if (!spans.length) return null;
    const now = Number(table.dataset.now);
    const ends = spans.map((span) => span[3]);
    const begins = spans.map((span) => span[2]);
    const first = Math.min(...begins);
    const last = Math.max(...ends, first + 1000);
    const whole = last - first;
    const axis = whole > 1.6e8 ? axisDay : whole > 1.2e6 ? axisClock : axisSeconds;
    const bar = (params, api) => {
      const [from, to] = [api.coord([api.value(2), api.value(0)]), api.coord([api.value(3), api.value(0)])];
      const height = Math.min(18, api.size([0, 1])[1] * 0.62);
      const shape = echarts.graphic.clipRectByRect(
        { x: from[0], y: from[1] - height / 2, width: Math.max(3, to[0] - from[0]), height },
        { x: params.coordSys.x, y: params.coordSys.y, width: params.coordSys.width + 4, height: params.coordSys.height },
      );
      return shape && { type: "rect", shape: { ...shape, r: 2 }, style: { fill: css(spans[params.dataIndex][1].toLowerCase()) || css("muted") } };
    };
    return {
      height: 76 + 26 * rows.length,
      option: {
        grid: { left: 8, right: 34, top: 22, bottom: 8, containLabel: true },
        tooltip: tooltip({
          formatter: ({ value }) => `${names[value[0]]}  ${value[1]}\n${clock.format(value[2])}\n${length(value[3] - value[2])}`,
        }),
        xAxis: {
          type: "time", min: first, max: last, splitNumber: 5,
          axisLabel: { color: css("muted"), fontSize: 11, hideOverlap: true, formatter: (ms) => axis.format(ms) },
          axisLine: line(), splitLine: { show: true, ...line() },
        },
        yAxis: {
          type: "category", data: names, inverse: true, axisLine: { show: false }, axisTick: { show: false },
          axisLabel: { ...ink(), width: 190, overflow: "truncate" },
        },
        series: [{
          type: "custom", renderItem: bar, data: spans, encode: { x: [2, 3], y: 0 },
          markLine: now <= last ? {
            silent: true, symbol: "none", data: [{ xAxis: now }],
            lineStyle: { color: css("ink"), type: "dashed" }, label: { formatter: "now", position: "start", color: css("muted") },
          } : undefined,
        }],
      },
    };
  }

  // Curves: rows carry data-points = [[x, y], ...].
  function curves(table) {
    const rows = [...table.tBodies[0].rows].filter((row) => row.dataset.points);
    if (!rows.length) return null;
    const dashes = ["solid", "dashed", "dotted"];
    return {
      option: {
        grid: { left: 8, right: 24, top: 34, bottom: 28, containLabel: true },
        tooltip: tooltip({ trigger: "axis", valueFormatter: (value) => Number(value).toFixed(4), axisPointer: line() }),
        legend: { top: 0, left: 0, type: "scroll", textStyle: ink(), itemWidth: 28, pageTextStyle: ink() },
        xAxis: {
          type: "value", name: table.dataset.x, nameLocation: "middle", nameGap: 24, nameTextStyle: { color: css("muted") },
          axisLabel: { color: css("muted") }, axisLine: line(), splitLine: { show: false }, min: "dataMin", max: "dataMax",
        },
        yAxis: { type: "value", scale: true, axisLabel: { color: css("muted") }, splitLine: line(), splitNumber: 4 },
        series: rows.map((row, at) => ({
          type: "line", name: row.cells[0].innerText.trim(), data: JSON.parse(row.dataset.points),
          showSymbol: false, symbol: ["circle", "rect", "triangle", "diamond"][at % 4], symbolSize: 7, endLabel: { show: false },
          lineStyle: { color: css(`series-${at % 6}`), width: 2, type: dashes[Math.floor(at / 6) % 3] },
          itemStyle: { color: css(`series-${at % 6}`) },
        })),
      },
    };
  }

  // Bars: rows carry data-value; the text of the second cell is the label.
  function bars(table) {
    const rows = [...table.tBodies[0].rows].filter((row) => row.dataset.value);
    if (!rows.length) return null;
    return {
      height: 50 + 28 * rows.length,
      option: {
        grid: { left: 8, right: 60, top: 6, bottom: 6, containLabel: true },
        tooltip: tooltip({ formatter: ({ name, dataIndex }) => `${name}  ${rows[dataIndex].dataset.label}` }),
        xAxis: { type: "value", min: 0, axisLabel: { show: false }, splitLine: { show: false } },
        yAxis: {
          type: "category", inverse: true, data: rows.map((row) => row.cells[0].innerText.trim()),
          axisLine: { show: false }, axisTick: { show: false }, axisLabel: { ...ink(), width: 170, overflow: "truncate" },
        },
        series: [{
          type: "bar", barMaxWidth: 16,
          data: rows.map((row) => ({
            value: Number(row.dataset.value),
            itemStyle: { color: css(row.dataset.colour || "series-0"), borderRadius: 2 },
          })),
          label: { show: true, position: "right", color: css("ink"), formatter: ({ dataIndex }) => rows[dataIndex].dataset.label },
        }],
      },
    };
  }

  // Budget: rows carry data-at (unix ms) and data-value; the table data-now, after which it is a
  // forecast, and may have data-since, when it was nothing, and data-limit.
  function budget(table) {
    const rows = [...table.tBodies[0].rows].filter((row) => row.dataset.at);
    if (!rows.length) return null;
    const now = Number(table.dataset.now);
    const points = rows.map(({ dataset }) => [Number(dataset.at), Number(dataset.value)]);
    if (table.dataset.since) points.unshift([Number(table.dataset.since), 0]);
    if (points.at(-1)[0] < now) points.push([now, points.at(-1)[1]]);
    const limit = Number(table.dataset.limit) || 0;
    const whole = new Intl.NumberFormat();
    const short = new Intl.NumberFormat(undefined, { notation: "compact" });
    const drawn = (data, more) => ({
      type: "line", step: "end", data, showSymbol: false, lineStyle: { color: css("series-0"), width: 2, ...more.line },
      itemStyle: { color: css("series-0") }, areaStyle: { color: css("series-0"), opacity: more.area }, ...more.rest,
    });
    const axis = points.at(-1)[0] - points[0][0] > 1.6e8 ? axisDay : axisClock;
    const top = limit ? [{ yAxis: limit, label: { formatter: "allowed", position: "insideEndTop", color: css("muted") }, lineStyle: { color: css("bad"), type: "dashed" } }] : [];
    const mark = { xAxis: now, label: { formatter: "now", color: css("muted") }, lineStyle: { color: css("ink"), type: "dotted" } };
    return {
      option: {
        grid: { left: 8, right: 24, top: 22, bottom: 6, containLabel: true },
        tooltip: tooltip({ trigger: "axis", formatter: ([{ value }]) => `${axis.format(value[0])}  ${whole.format(value[1])}`, axisPointer: line() }),
        xAxis: {
          type: "time", axisLine: line(), splitLine: { show: false },
          axisLabel: { color: css("muted"), fontSize: 11, hideOverlap: true, formatter: (ms) => axis.format(ms) },
        },
        yAxis: {
          type: "value", min: 0, max: limit ? Math.max(limit, ...points.map((point) => point[1])) : undefined, splitNumber: 3,
          axisLabel: { color: css("muted"), formatter: (value) => short.format(value) }, splitLine: line(),
        },
        series: [
          drawn(points.filter(([at]) => at <= now), { line: {}, area: 0.14, rest: { markLine: { silent: true, symbol: "none", data: now < points.at(-1)[0] ? [...top, mark] : top } } }),
          drawn(points.filter(([at]) => at >= now), { line: { type: "dashed" }, area: 0.06, rest: {} }),
        ],
      },
    };
  }

  // Lineage: rows carry data-name, data-parent and data-from (what else went in); left to right.
  function lineage(table) {
    const rows = [...table.tBodies[0].rows].filter((row) => row.dataset.name);
    const place = new Map();
    const used = [];
    const nodes = [];
    const links = [];
    for (const { dataset } of rows) {
      const x = place.has(dataset.parent) ? place.get(dataset.parent) + 1 : 0;
      used[x] = (used[x] ?? 0) + 1;
      place.set(dataset.name, x);
      const fill = css(dataset.newest ? "accent" : "surface");
      nodes.push({
        name: dataset.name, value: [x, used[x] - 1], from: dataset.from, href: dataset.href,
        itemStyle: { color: fill, borderColor: css(dataset.newest ? "accent" : "strong"), borderWidth: 1.5 },
        label: { color: css(dataset.newest ? "on-accent" : "ink"), fontWeight: dataset.newest ? 600 : 400 },
      });
      if (place.has(dataset.parent)) links.push({ source: dataset.parent, target: dataset.name, words: dataset.words });
    }
    if (nodes.length < 2) return null;
    const wide = used.length;
    const hidden = { show: false, type: "value" };
    return {
      height: 60 + 64 * Math.max(...used),
      open: (data) => data?.href && location.assign(data.href),
      option: {
        grid: { left: 10, right: 10, top: 10, bottom: 10 },
        tooltip: tooltip({ formatter: ({ data, dataType }) => (dataType === "edge" ? data.words : `${data.name}\n${data.from}`) }),
        xAxis: { ...hidden, min: -0.5, max: Math.max(wide, 4) - 0.5 },
        yAxis: { ...hidden, min: -0.5, max: Math.max(...used) - 0.5, inverse: true },
        series: [{
          type: "graph", coordinateSystem: "cartesian2d", data: nodes, links, symbol: "rect",
          symbolSize: [Math.min(110, 900 / Math.max(wide, 4) - 30), 32], label: { show: true, fontSize: 12 },
          edgeSymbol: ["none", "arrow"], edgeSymbolSize: 8, lineStyle: { color: css("muted"), width: 1.5, opacity: 1 },
          edgeLabel: { show: wide <= 7, formatter: ({ data }) => data.words, fontSize: 11, color: css("muted") },
        }],
      },
    };
  }

  const KINDS = { lanes, curves, bars, budget, lineage };

  function draw() {
    for (const [figure, plot] of plots) {
      if (!figure.isConnected) {
        plot.dispose();
        plots.delete(figure);
      }
    }
    for (const figure of document.querySelectorAll("figure[data-plot]")) {
      const table = document.getElementById(figure.dataset.table);
      const made = table && KINDS[figure.dataset.plot](table);
      figure.hidden = !made;
      if (!made) continue;
      if (made.height) figure.style.height = `${made.height}px`;
      let plot = plots.get(figure);
      if (!plot) {
        plot = echarts.init(figure, null, { renderer: "svg" });
        plot.on("click", ({ data }) => made.open?.(data));
        plots.set(figure, plot);
        new ResizeObserver(() => plot.resize()).observe(figure);
      }
      plot.setOption({ animation: !still.matches, animationDuration: 250, textStyle: { fontFamily: font(), fontSize: 12 }, ...made.option }, { notMerge: true });
      plot.resize();
      figure.dataset.drawn = "";
    }
  }

  document.addEventListener("DOMContentLoaded", draw);
  document.addEventListener("htmx:after:swap", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
