// Runs before the first paint, so that a page chosen dark never flashes light.
try {
  const theme = localStorage.getItem("pronk.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is switched off: the system's colours it is.
}
