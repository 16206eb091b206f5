// Keeps a page fresh: one stream of "something has changed", upon which htmx fetches the page again
// and morphs what differs. Without scripts every page works; it is only not live.
"use strict";

const local = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

// Times in the reader's own zone; UTC stays in the title.
function localTimes() {
  for (const time of document.querySelectorAll("time[datetime]")) {
    const text = local.format(new Date(time.dateTime));
    if (time.textContent !== text) time.textContent = text;
  }
}

function follow() {
  const address = document.body.dataset.news;
  if (!address) return;
  const lamp = () => document.querySelector(".live");
  const stream = new EventSource(address);
  const show = (on) => lamp()?.toggleAttribute("data-on", on);
  stream.addEventListener("open", () => show(true));
  stream.addEventListener("error", () => show(false));
  stream.addEventListener("news", () => document.body.dispatchEvent(new Event("news")));
  document.addEventListener("htmx:after:swap", () => show(stream.readyState === EventSource.OPEN));
  addEventListener("pagehide", () => stream.close());
}

document.addEventListener("submit", (event) => {
  const words = event.target.dataset.confirm;
  if (words && !confirm(words)) event.preventDefault();
});
document.addEventListener("htmx:after:swap", localTimes);
document.addEventListener("DOMContentLoaded", () => {
  localTimes();
  follow();
});
