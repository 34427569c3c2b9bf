"use strict";
// Sortable tables: a click or a key on a header's button sorts by its column, a second one turns the order round.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of headers) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      const body = table.tBodies[0];
      const numeric = header.classList.contains("number");
      const compare = (a, b) => (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
      const rows = [...body.rows].map((row) => ({ row, value: row.cells[column].dataset.sort }));
      // what has no value comes last in either order
      rows.sort((a, b) => (a.value === "") - (b.value === "") || direction * compare(a.value, b.value));
      body.append(...rows.map((entry) => entry.row));
    });
  });
}
// A link of the page to a folded section opens it.
const unfold = () => {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
};
addEventListener("hashchange", unfold);
unfold();
// A page of a run that goes on loads itself again; where it has long been the same, it says so: a run that was killed
// could not write that it ended.
const stale = document.getElementById("stale");
const minutes = stale ? Math.floor((Date.now() / 1000 - Number(stale.dataset.written)) / 60) : 0;
if (minutes >= 10) {
  stale.querySelector("span").textContent = minutes;
  stale.hidden = false;
}
