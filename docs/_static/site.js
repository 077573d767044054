// The theme names its search button "Search" although "Search Ctrl + K" is written on it: what is written is its name.
addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".search-button-field").forEach((each) => {
    each.setAttribute("aria-label", each.textContent.trim().replace(/\s+/g, " ").replace(/ ?\+ ?/g, "+") || "Search");
  });
});
