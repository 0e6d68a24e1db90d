// Shows the epochs of the gate with a slider. The page holds the figure, its frames and Bokeh.
(async () => {
  const data = JSON.parse(document.getElementById("moving-data").textContent);
  const part = document.getElementById("moving"), slider = document.getElementById("moving-epoch");
  const button = document.getElementById("moving-play"), caption = document.getElementById("moving-text");
  part.hidden = false;
  await Bokeh.embed.embed_item({ ...data.figure, target_id: "moving-figure" });
  const figure = Bokeh.documents[Bokeh.documents.length - 1];
  const lines = figure.get_model_by_name("lines");
  const axes = ["tasks", "branches"].map((name) => figure.get_model_by_name(name));

  const show = () => {
    const frame = data.frames[slider.value - 1];
    const probability = frame.probabilities;
    lines.data = {
      ...lines.data, probability,
      width: probability.map((p) => data.thick * p),
      alpha: probability.map((p) => Number(p >= data.faint)),  // a canvas ignores a width of 0 and keeps the previous one
    };
    caption.textContent = frame.text;
    slider.setAttribute("aria-valuetext", frame.text);
  };
  const recolour = () => {
    const text = getComputedStyle(part).color;
    axes.forEach((axis) => { axis.major_label_text_color = text; });
  };

  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
  button.addEventListener("click", () => {
    if (timer) { stop(); return; }
    if (slider.value === slider.max) slider.value = 1;
    show();
    button.textContent = "Stop";
    const pause = Math.max(60, Math.min(600, 6000 / data.frames.length));
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (slider.value === slider.max) stop();
    }, pause);
  });
  slider.addEventListener("input", () => { stop(); show(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  recolour();
  show();
  part.dataset.ready = "yes";
})();
