"use strict";
// This script filters both tables and sorts the table of results. Without it, they have all rows in order of cases.
const body = document.querySelector("#rows tbody");
const rows = Array.from(body.rows);
const filtered = Array.from(document.querySelectorAll("table.filtered tbody tr"));
const titles = Array.from(document.querySelectorAll("#rows thead th"));
const form = document.getElementById("filters");
const text = document.getElementById("text");
const sort = document.getElementById("sort");
let descending = false;

function show() {
  const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = Array.from(form.querySelectorAll("[data-filter]")).filter((select) => select.value !== "");
  let shown = 0;
  for (const row of filtered) {
    const searched = (row.textContent + " " + row.dataset.case).toLowerCase();
    const fits = chosen.every((select) => row.dataset[select.dataset.filter] === select.value);
    row.hidden = !(fits && words.every((word) => searched.includes(word)));
    shown += row.hidden || row.parentNode !== body ? 0 : 1;
  }
  document.getElementById("count").textContent = `${shown} of ${rows.length} rows`;
}

function order() {
  const column = sort.value === "" ? null : Number(sort.value);
  const sorted = rows.slice();
  if (column !== null) {
    const key = (row) => row.cells[column].dataset.key;
    const isNumber = rows.some((row) => row.cells[column].classList.contains("number"));
    const compare = isNumber ? (a, b) => Number(key(a)) - Number(key(b)) : (a, b) => key(a).localeCompare(key(b));
    const isMissing = (row) => row.cells[column].textContent === "";
    sorted.sort((a, b) => isMissing(a) - isMissing(b) || (descending ? compare(b, a) : compare(a, b)) || 0);
  }
  body.append(...sorted);
  titles.forEach((title, at) => {
    title.removeAttribute("aria-sort");
    if (at === column) title.setAttribute("aria-sort", descending ? "descending" : "ascending");
  });
}

titles.forEach((title, at) => {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = title.textContent;
  button.addEventListener("click", () => {
    descending = sort.value === String(at) && !descending;
    sort.value = String(at);
    order();
  });
  title.replaceChildren(button);
  if (rows.some((row) => row.cells[at].classList.contains("number"))) title.classList.add("number");
});
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", (event) => {
  if (event.target === sort) {
    descending = false;
    order();
  } else {
    show();
  }
});
form.hidden = false;
show();
