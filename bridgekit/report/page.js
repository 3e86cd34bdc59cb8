// The report's only script: it fills in players and thumbnails, and makes heat maps and the map interactive.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const read = (id) => (byId(id) ? JSON.parse(byId(id).textContent) : []);
  const media = read("media");
  const items = read("items");
  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };
  const drawn = (name, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };

  // ---- light and dark

  const root = document.documentElement;
  const theme = byId("theme");
  let dark = matchMedia("(prefers-color-scheme: dark)").matches;
  theme.hidden = false;
  const showTheme = () => { theme.textContent = dark ? "Light" : "Dark"; };
  theme.addEventListener("click", () => {
    dark = !dark;
    root.style.colorScheme = dark ? "dark" : "light";
    showTheme();
  });
  showTheme();

  // ---- players: one clip at a time

  const player = new Audio();
  let playing = null; // a media number
  const PLAY = "M2 1l9 5-9 5z";
  const STOP = "M2 2h8v8H2z";

  const buttons = () => document.querySelectorAll(".play");
  const show = () => {
    const share = player.duration ? (100 * player.currentTime) / player.duration : 0;
    for (const button of buttons()) {
      const own = Number(button.dataset.media) === playing;
      button.querySelector(".sign path").setAttribute("d", own ? STOP : PLAY);
      button.style.setProperty("--played", own ? `${share}%` : "0%");
    }
    if (playing !== null) requestAnimationFrame(show);
  };
  const stop = () => {
    player.pause();
    playing = null;
    show();
  };
  const play = async (number) => {
    playing = number;
    player.src = media[number].uri;
    show();
    try {
      await player.play();
      return true;
    } catch (error) {
      if (error.name === "AbortError") return true; // replaced by another clip
      if (playing === number) stop();
      return false;
    }
  };
  player.addEventListener("ended", stop);
  document.addEventListener("click", (event) => {
    const button = event.target.closest(".play");
    if (!button) return;
    const number = Number(button.dataset.media);
    if (playing === number) stop();
    else play(number);
  });

  const fill = (place) => {
    const found = media[Number(place.dataset.media)];
    if (place.matches("img, image")) {
      place.setAttribute(place.matches("img") ? "src" : "href", found.uri);
      return place;
    }
    place.append(
      drawn("svg", { class: "sign", viewBox: "0 0 12 12", "aria-hidden": "true" }, drawn("path", { d: PLAY })),
      drawn("svg", { viewBox: "0 0 48 16", "aria-hidden": "true" },
        drawn("path", { d: found.wave }), drawn("path", { d: found.wave, class: "played" })),
      `${found.seconds.toFixed(1)} s`,
    );
    return place;
  };
  document.querySelectorAll("[data-media]").forEach(fill);

  // ---- what is wider than the window says that it scrolls

  const sizes = new ResizeObserver((entries) => {
    for (const { target } of entries) target.classList.toggle("wider", target.scrollWidth > target.clientWidth);
  });
  document.querySelectorAll(".scrolling").forEach((place) => sizes.observe(place));

  // ---- heat maps: the value of a cell

  const heats = read("heats");
  for (const figure of document.querySelectorAll(".heat")) {
    const { rows, columns, cosines } = heats[figure.dataset.heat];
    const region = figure.querySelector(".scrolling");
    const area = byId(`${figure.dataset.heat}-cells`);
    const output = figure.querySelector("output");
    const frame = drawn("rect", { class: "frame", visibility: "hidden" });
    area.ownerSVGElement.append(frame);
    let at = [-1, 0];
    const showCell = (row, column) => {
      if (!(row in rows) || !(column in columns)) return;
      at = [row, column];
      const box = area.getBBox();
      const [width, height] = [box.width / columns.length, box.height / rows.length];
      const place = { x: box.x + column * width, y: box.y + row * height, width, height, visibility: "visible" };
      for (const [key, value] of Object.entries(place)) frame.setAttribute(key, value);
      const cosine = (cosines[row][column] + 0).toFixed(2).replace("-", "−"); // + 0: no minus before zero
      output.textContent = `${rows[row]} × ${columns[column]}: ${cosine}`;
    };
    const point = (event) => {
      const box = area.getBoundingClientRect();
      showCell(
        Math.floor(((event.clientY - box.top) / box.height) * rows.length),
        Math.floor(((event.clientX - box.left) / box.width) * columns.length),
      );
    };
    region.addEventListener("pointermove", point);
    region.addEventListener("click", point);
    region.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      showCell(...(at[0] < 0 ? [0, 0] : [at[0] + step[0], at[1] + step[1]]));
      frame.scrollIntoView({ block: "nearest", inline: "nearest" });
    });
  }

  // ---- the map

  const map = byId("points");
  if (!map) return;
  const marks = [...map.querySelectorAll(".point")];
  const labels = items.map(() => []);
  for (const label of map.querySelectorAll("[data-item]")) labels[label.dataset.item].push(label);
  const card = byId("card");
  const links = byId("links");
  const sound = byId("sound");
  const NEAR = { mouse: 20, touch: 32, pen: 24 }; // CSS pixels
  let chosen = null;
  let pinned = false; // chosen by a click: hovering does not change it

  const shownItem = (item) => {
    const parts = [];
    if (item.media !== null) {
      const kind = media[item.media].kind;
      const place = kind === "image" ? element("img", { alt: item.name }) : element("button", { type: "button", className: "play" });
      if (kind !== "image") place.setAttribute("aria-label", `Play ${item.name}`);
      place.dataset.media = item.media;
      parts.push(fill(place));
    }
    parts.push(element("p", { className: item.modality === "text" ? "text" : "file" }, element("bdi", { textContent: item.name })));
    return parts;
  };

  const choose = async (number, aloud) => {
    if (number === chosen) return;
    chosen = number;
    const item = items[number];
    for (const mark of map.querySelectorAll(".chosen, .partner")) mark.classList.remove("chosen", "partner");
    marks.forEach((mark, at) => { mark.tabIndex = at === number ? 0 : -1; });
    marks[number].classList.add("chosen");
    links.replaceChildren();
    const listed = element("ul");
    for (const [other, cosine] of item.partners) {
      marks[other].classList.add("partner");
      const [x1, y1] = item.at, [x2, y2] = items[other].at;
      links.append(drawn("line", { x1, y1, x2, y2 }));
      if (listed.childElementCount < 6) {
        const go = element("button", { type: "button", className: "go", textContent: `cosine ${cosine.toFixed(2)}, show on map` });
        go.addEventListener("click", () => { pinned = true; marks[other].focus({ preventScroll: true }); });
        listed.append(element("li", {}, ...shownItem(items[other]), go));
      }
    }
    const more = item.partners.length - listed.childElementCount;
    card.replaceChildren(
      element("p", { className: "kind", textContent: item.modality }),
      ...shownItem(item),
      element("p", { className: "kind", textContent: item.partners.length ? "matches" : "no matching item on the map" }),
      listed,
      ...(more > 0 ? [element("p", { className: "kind", textContent: `and ${more} more` })] : []),
    );
    const clip = item.media !== null && media[item.media].kind === "audio";
    if (aloud && clip && (!sound || sound.checked) && !(await play(item.media)) && chosen === number) {
      card.prepend(element("p", { className: "kind", textContent: "Browsers play sound only after the first click on a page." }));
    } else if (!clip && playing !== null) {
      stop();
    }
  };

  const nearest = (event) => {
    const box = map.getBoundingClientRect();
    const scale = box.width / map.viewBox.baseVal.width;
    const x = (event.clientX - box.left) / scale, y = (event.clientY - box.top) / scale;
    let best = null, least = (NEAR[event.pointerType] ?? NEAR.mouse) / scale;
    items.forEach(({ at }, number) => {
      const distance = Math.hypot(at[0] - x, at[1] - y);
      if (distance < least && !marks[number].classList.contains("dim")) [best, least] = [number, distance];
    });
    return best;
  };
  map.addEventListener("pointermove", (event) => {
    if (event.pointerType === "touch" || pinned) return;
    const number = nearest(event);
    if (number !== null) choose(number, true);
  });
  map.addEventListener("mousedown", (event) => event.preventDefault()); // the click chooses the nearest point, not whatever takes the focus
  map.addEventListener("click", (event) => {
    if (event.detail === 0) return; // by keyboard: see below
    const number = nearest(event);
    pinned = number !== null;
    if (number === null) return;
    if (number === chosen && items[number].media !== null && media[items[number].media].kind === "audio") play(items[number].media);
    choose(number, true);
  });

  // ---- by keyboard

  const WAYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const towards = (from, [dx, dy]) => {
    let best = null, least = Infinity;
    items.forEach(({ at }, number) => {
      const x = at[0] - items[from].at[0], y = at[1] - items[from].at[1];
      const along = x * dx + y * dy, across = Math.abs(x * dy) + Math.abs(y * dx);
      if (along <= 0 || marks[number].classList.contains("dim")) return;
      const cost = along + 2 * across;
      if (cost < least) [best, least] = [number, cost];
    });
    return best;
  };
  map.addEventListener("focusin", (event) => {
    const number = marks.indexOf(event.target);
    if (number >= 0) choose(number, true);
  });
  map.addEventListener("keydown", (event) => {
    const at = marks.indexOf(event.target);
    if (at < 0) return;
    let next = null;
    if (event.key in WAYS) next = towards(at, WAYS[event.key]);
    else if (event.key === "Home") next = 0;
    else if (event.key === "End") next = items.length - 1;
    else if (event.key === "Escape") { pinned = false; stop(); return; }
    else if (event.key === "Enter" || event.key === " ") {
      pinned = true;
      if (items[at].media !== null && media[items[at].media].kind === "audio") play(items[at].media);
    } else return;
    event.preventDefault();
    if (next !== null) marks[next].focus();
  });

  // ---- search

  const find = byId("find");
  const fits = () => {
    const words = find.value.trim().toLowerCase();
    let count = 0, first = null;
    items.forEach(({ name }, number) => {
      const hit = name.toLowerCase().includes(words);
      marks[number].classList.toggle("dim", !hit);
      for (const label of labels[number]) label.classList.toggle("dim", !hit);
      if (hit && first === null) first = number;
      count += hit;
    });
    byId("found").textContent = words ? `${count} of ${items.length}` : "";
    return words ? first : null;
  };
  find.addEventListener("input", fits);
  find.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    const first = fits();
    if (first !== null) marks[first].focus();
  });
})();
