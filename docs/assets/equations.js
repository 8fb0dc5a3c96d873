// Draws the equations of a page with KaTeX. MkDocs puts this at the end of the page.
for (const place of document.querySelectorAll(".arithmatex")) {
  const text = place.textContent.trim();
  katex.render(text.slice(2, -2), place, {
    displayMode: text.startsWith("\\["),
    throwOnError: false,
  });
}
