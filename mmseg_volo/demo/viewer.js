// The viewer of one result; Gradio runs this as the body of a function with `element`, `props` and `watch`.
// props.value is what mmseg_volo/demo/result.py makes. Names become text only, never HTML.

const SHOWN = 2048; // pixels of the longer side of the coloured layer
let drawn = 0;

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Response(stream).arrayBuffer();
}

function percent(part) {
  return part > 0 && part < 0.0005 ? '< 0.1 %' : `${(100 * part).toFixed(1)} %`;
}

function chip(colour) {
  return make('span', { class: 'volo-chip', style: `background: rgb(${colour})`, 'aria-hidden': 'true' });
}

async function show() {
  const root = element.querySelector('.volo-viewer');
  const result = props.value;
  const turn = ++drawn;
  if (!root) return;
  if (!result || !result.width) {
    root.replaceChildren(make('div', { class: 'volo-empty' }, 'The prediction will appear here.'));
    return;
  }
  const buffer = await unpack(result.ids);
  const ids = result.wide ? new Uint16Array(buffer) : new Uint8Array(buffer);
  const confidence = result.confidence ? new Uint8Array(await unpack(result.confidence)) : null;
  if (turn !== drawn) return; // a newer result came meanwhile
  const { width, height, names, colours, shares } = result;

  const image = make('img', { src: result.picture, alt: 'The picture', draggable: 'false' });
  const shrink = Math.min(1, SHOWN / Math.max(width, height));
  const canvas = make('canvas', { 'aria-hidden': 'true' });
  canvas.width = Math.max(1, Math.round(width * shrink));
  canvas.height = Math.max(1, Math.round(height * shrink));
  const divider = make('div', { class: 'volo-divider', 'aria-hidden': 'true' });
  const point = make('div', { class: 'volo-point', hidden: '', 'aria-hidden': 'true' });
  const tip = make('div', { class: 'volo-tip', hidden: '', 'aria-hidden': 'true' });
  const stage = make(
    'div',
    {
      class: 'volo-stage',
      tabindex: '0',
      role: 'application',
      'aria-roledescription': 'picture with prediction',
      'aria-label': 'Class at a point. Arrow keys move the point, with Shift by single pixels.',
      style: `aspect-ratio: ${width} / ${height}; max-width: min(100%, calc(75vh * ${width / height}))`,
    },
    image, canvas, divider, point, tip,
  );
  const line = make('p', { class: 'volo-line' }, 'Point at the picture, or tap it, to see the class there.');
  const spoken = element.querySelector('[role=status]');

  function paint(only) {
    const context = canvas.getContext('2d');
    const pixels = context.createImageData(canvas.width, canvas.height);
    const words = new Uint32Array(pixels.data.buffer);
    // Bytes red, green, blue, alpha, in the order of every machine that runs a browser.
    const table = Uint32Array.from({ length: names.length }, (_, id) => {
      const [r, g, b] = colours[id];
      return only === null || only === id ? ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0 : 0xc0000000;
    });
    let at = 0;
    for (let y = 0; y < canvas.height; y++) {
      const row = Math.floor(((y + 0.5) * height) / canvas.height) * width;
      for (let x = 0; x < canvas.width; x++) {
        words[at++] = table[ids[row + Math.floor(((x + 0.5) * width) / canvas.width)]];
      }
    }
    context.putImageData(pixels, 0, 0);
  }

  // The slider between picture and prediction, by mouse and touch on the picture and by keys on the bar below it.
  const compare = make('input', { type: 'range', min: '0', max: '100', step: '1', value: '50', id: 'volo-compare' });
  const strength = make('input', { type: 'range', min: '0', max: '100', step: '5', value: '65', id: 'volo-strength' });
  function place() {
    canvas.style.clipPath = `inset(0 0 0 ${compare.value}%)`;
    canvas.style.opacity = strength.value / 100;
    divider.style.left = `${compare.value}%`;
    compare.setAttribute('aria-valuetext', `picture on the left ${compare.value} per cent, prediction on the rest`);
    strength.setAttribute('aria-valuetext', `${strength.value} per cent`);
  }
  compare.addEventListener('input', place);
  strength.addEventListener('input', place);
  function follow(event) {
    const box = stage.getBoundingClientRect();
    compare.value = Math.round(Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)) * 100);
    place();
  }
  divider.addEventListener('pointerdown', (event) => {
    event.preventDefault();
    divider.setPointerCapture(event.pointerId);
    tip.hidden = true;
    follow(event);
  });
  divider.addEventListener('pointermove', (event) => {
    if (divider.hasPointerCapture(event.pointerId)) {
      event.stopPropagation();
      follow(event);
    }
  });

  // The class under the pointer, the finger, or the point that the arrow keys move.
  let here = [width >> 1, height >> 1];
  function words([x, y]) {
    const id = ids[y * width + x];
    const sure = confidence ? `, ${confidence[y * width + x]} % sure` : '';
    return [id, `${names[id]}${sure}`];
  }
  function tell(position) {
    here = position;
    const [id, text] = words(here);
    line.replaceChildren(chip(colours[id]), `${text} (id ${id}, at ${here[0]}, ${here[1]})`);
    line.dataset.id = id;
    return [id, text];
  }
  function under(event) {
    const box = stage.getBoundingClientRect();
    const clamp = (value, size) => Math.min(size - 1, Math.max(0, Math.floor(value * size)));
    return [
      clamp((event.clientX - box.left) / box.width, width),
      clamp((event.clientY - box.top) / box.height, height),
    ];
  }
  function mark() {
    point.hidden = false;
    point.style.left = `${((here[0] + 0.5) / width) * 100}%`;
    point.style.top = `${((here[1] + 0.5) / height) * 100}%`;
  }
  stage.addEventListener('pointermove', (event) => {
    if (event.pointerType === 'touch') return;
    const [id, text] = tell(under(event));
    const box = stage.getBoundingClientRect();
    const [left, top] = [event.clientX - box.left, event.clientY - box.top];
    tip.replaceChildren(chip(colours[id]), text);
    tip.hidden = false;
    tip.style.left = `${left + 14 + tip.offsetWidth > box.width ? Math.max(0, left - 10 - tip.offsetWidth) : left + 14}px`;
    tip.style.top = `${top + 18 + tip.offsetHeight > box.height ? Math.max(0, top - 10 - tip.offsetHeight) : top + 18}px`;
    point.hidden = true;
  });
  stage.addEventListener('pointerleave', () => (tip.hidden = true));
  stage.addEventListener('click', (event) => {
    tell(under(event));
    mark();
  });
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  stage.addEventListener('keydown', (event) => {
    const way = arrows[event.key];
    if (!way) return;
    event.preventDefault();
    const stride = event.shiftKey ? 1 : Math.max(1, Math.round(Math.max(width, height) / 50));
    const limit = (value, size) => Math.min(size - 1, Math.max(0, value));
    const [, text] = tell([limit(here[0] + way[0] * stride, width), limit(here[1] + way[1] * stride, height)]);
    tip.hidden = true;
    mark();
    spoken.textContent = text;
  });

  // The share of each class; a click on one shows it alone.
  let alone = null;
  const buttons = new Map();
  function choose(id) {
    alone = alone === id ? null : id;
    for (const [other, button] of buttons) button.setAttribute('aria-pressed', String(other === alone));
    paint(alone);
  }
  const rows = shares.map(([id, part]) => {
    const button = make('button', { type: 'button', 'aria-pressed': 'false', onclick: () => choose(id) });
    button.append(chip(colours[id]), names[id]);
    buttons.set(id, button);
    const style = `width: ${100 * part}%; background: rgb(${colours[id]})`;
    return make(
      'tr',
      { 'data-id': id },
      make('th', { scope: 'row' }, button),
      make('td', {}, make('div', { class: 'volo-bar', style, 'aria-hidden': 'true' })),
      make('td', {}, percent(part)),
    );
  });
  const head = ['Class', 'Share', 'Per cent'].map((text) => make('th', { scope: 'col' }, text));
  const count = `${shares.length} of ${names.length} classes`;
  const table = make(
    'table',
    {},
    make('caption', {}, `${count}. Click one to see it alone.`),
    make('thead', { class: 'volo-hidden' }, make('tr', {}, ...head)),
    make('tbody', {}, ...rows),
  );

  paint(null);
  place();
  root.replaceChildren(
    stage,
    make(
      'div',
      { class: 'volo-bars' },
      make('label', {}, 'Picture ↔ prediction', compare),
      make('label', {}, 'Strength of colours', strength),
    ),
    line,
    make('p', { class: 'volo-note' }, result.note),
    table,
  );
  const largest = shares.slice(0, 3).map(([id, part]) => `${names[id]} ${percent(part)}`);
  spoken.textContent = `Prediction done: ${count}; ${largest.join(', ')}.`;
}

// Gradio gives its examples' buttons no names.
function nameExamples() {
  const buttons = document.querySelectorAll('#examples button');
  buttons.forEach((button, i) => button.setAttribute('aria-label', `Example ${i + 1}, a drawn street`));
}
new MutationObserver(nameExamples).observe(document.querySelector('#examples') ?? document.body, {
  childList: true,
  subtree: true,
});
nameExamples();
watch('value', show);
show();
